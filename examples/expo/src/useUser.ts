/**
 * Who is signed in. The app remembers that by itself: with an expired token and no network
 * supabase-js knows of no session, but the gallery is on the device all the same.
 */
import AsyncStorage from '@react-native-async-storage/async-storage';
import { useEffect, useRef, useState } from 'react';

import { supabase } from './supabase';
import { forgetPictures } from './usePicture';

export interface User {
  id: string;
  email: string;
}

const REMEMBERED = 'darkroom.user';

/** Undefined for the moment it takes to look; null if nobody is. */
export function useUser(): User | null | undefined {
  const [user, setUser] = useState<User | null>();
  const isLeaving = useRef(false);
  useEffect(() => {
    void AsyncStorage.getItem(REMEMBERED).then(
      (text) => setUser((known) => known ?? (JSON.parse(text ?? 'null') as User | null)),
      () => setUser((known) => known ?? null),
    );
    const { data } = supabase.auth.onAuthStateChange((event, session) => {
      if (session) {
        const { id, email = '' } = session.user;
        setUser((known) => (known?.id === id ? known : { id, email }));
        void AsyncStorage.setItem(REMEMBERED, JSON.stringify({ id, email }));
      } else if (event === 'SIGNED_OUT') {
        isLeaving.current = true;
        setUser(null);
      }
    });
    return () => data.subscription.unsubscribe();
  }, []);
  useEffect(() => {
    if (user !== null || !isLeaving.current) return;
    isLeaving.current = false;
    void forget(); // the screen that wrote there has stopped before this runs
  }, [user]);
  return user;
}

/** Signs out on this device, also without a network. */
export async function signOut(): Promise<void> {
  await supabase.auth.signOut({ scope: 'local' });
}

/** Leaves nothing of a user on the device: list, pictures, and what was not sent yet. */
async function forget(): Promise<void> {
  const names = (await AsyncStorage.getAllKeys()).filter((name) => name.startsWith('darkroom.'));
  await AsyncStorage.multiRemove(names);
  await forgetPictures();
}
