/**
 * Who is signed in. That is who is in the stored session: with an expired token and no network
 * supabase-js knows of none, but the gallery is on the device all the same.
 */
import AsyncStorage from '@react-native-async-storage/async-storage';
import { useEffect, useState } from 'react';

import { forgetPictures } from './darkroom';
import { sessionStorage } from './session';
import { SESSION, supabase } from './supabase';

export interface User {
  id: string;
  email: string;
  /** Signed in by a code from a mail, to choose a new password. */
  isRecovering: boolean;
}

/** There from the press on "Sign out" until the session is gone, also if the app is killed. */
const LEAVING = 'leaving';
let isLeaving = false;

/** Undefined for the moment it takes to look; null if nobody is. */
export function useUser(): User | null | undefined {
  const [user, setUser] = useState<User | null>();
  useEffect(() => {
    let stop = () => {};
    void stored().catch(() => null).then((found) => {
      setUser(found);
      const { data } = supabase.auth.onAuthStateChange((event, session) => {
        if (event === 'SIGNED_OUT') {
          isLeaving = false;
          void AsyncStorage.removeItem(LEAVING);
          setUser(null);
        } else if (session && !isLeaving) {
          const { id, email = '' } = session.user;
          const isRecovering = event === 'PASSWORD_RECOVERY';
          const isNews = isRecovering || event === 'USER_UPDATED';
          setUser((known) => known?.id === id && !isNews ? known : { id, email, isRecovering });
        }
      });
      stop = () => data.subscription.unsubscribe();
      if (isLeaving) void signOut();
    });
    return () => stop();
  }, []);
  useEffect(() => {
    if (user === null) void forget(); // the screen that wrote there has stopped before this runs
  }, [user]);
  return user;
}

/** Signs out on this device, also without a network. */
export async function signOut(): Promise<void> {
  isLeaving = true;
  await AsyncStorage.setItem(LEAVING, 'true').catch(() => undefined);
  await supabase.auth.signOut({ scope: 'local' });
}

/** Who was here last, unless he was signing out. */
async function stored(): Promise<User | null> {
  isLeaving = !!(await AsyncStorage.getItem(LEAVING));
  const session = JSON.parse((!isLeaving && (await sessionStorage.getItem(SESSION))) || 'null');
  const { id, email = '' } = session?.user ?? {};
  return session && { id, email, isRecovering: false };
}

/** Leaves nothing of a former user on the device: list, pictures, and what was not sent yet. */
async function forget(): Promise<void> {
  const names = (await AsyncStorage.getAllKeys()).filter((name) => name.startsWith('darkroom.'));
  await AsyncStorage.multiRemove(names);
  await forgetPictures();
}
