/** The one client of this app. */
import { createClient } from '@supabase/supabase-js';

import { createApi, type Database } from './darkroom';
import { sessionStorage } from './session';

// Expo puts these values into the bundle, and only when they are written out like this.
const url = process.env.EXPO_PUBLIC_SUPABASE_URL;
const key = process.env.EXPO_PUBLIC_SUPABASE_ANON_KEY;
if (!url) throw new Error('EXPO_PUBLIC_SUPABASE_URL is not set');
if (!key) throw new Error('EXPO_PUBLIC_SUPABASE_ANON_KEY is not set');

/** Under which name the session is stored. */
export const SESSION = 'session';

export const supabase = createClient<Database>(url, key, {
  auth: { storage: sessionStorage, storageKey: SESSION, detectSessionInUrl: false },
});

export const api = createApi(supabase);
