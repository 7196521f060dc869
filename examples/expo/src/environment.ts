/** What a phone gives the core: storage, ids, and whether the app is in front. */
import AsyncStorage from '@react-native-async-storage/async-storage';
import { randomUUID } from 'expo-crypto';
import { AppState } from 'react-native';

import type { Environment } from './darkroom';
import { supabase } from './supabase';

export const environment: Environment = {
  storage: AsyncStorage,
  newKey: randomUUID,
  isVisible: () => AppState.currentState === 'active',
  onChange(callBack) {
    const subscription = AppState.addEventListener('change', callBack);
    return () => subscription.remove();
  },
};

// Timers stand still behind other apps: a token is refreshed when this one is in front again.
AppState.addEventListener('change', (state) => {
  void (state === 'active' ? supabase.auth.startAutoRefresh() : supabase.auth.stopAutoRefresh());
});
