/** What a browser gives the core: storage, ids, and whether the tab is in front. */
import AsyncStorage from '@react-native-async-storage/async-storage';
import { randomUUID } from 'expo-crypto';

import type { Environment } from './darkroom';

export const environment: Environment = {
  storage: AsyncStorage,
  newKey: randomUUID,
  isVisible: () => document.visibilityState === 'visible',
  onChange(callBack) {
    document.addEventListener('visibilitychange', callBack);
    window.addEventListener('online', callBack);
    return () => {
      document.removeEventListener('visibilitychange', callBack);
      window.removeEventListener('online', callBack);
    };
  },
};
