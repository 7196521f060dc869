/** Where a phone keeps the session. */
import AsyncStorage from '@react-native-async-storage/async-storage';

const mockKeychain = new Map<string, string>();
jest.mock('expo-secure-store', () => ({
  getItemAsync: async (name: string) => mockKeychain.get(name) ?? null,
  setItemAsync: async (name: string, value: string) => void mockKeychain.set(name, value),
  deleteItemAsync: async (name: string) => void mockKeychain.delete(name),
}));
jest.mock(
  '@react-native-async-storage/async-storage',
  () => jest.requireActual('@react-native-async-storage/async-storage/jest/async-storage-mock'),
);

const user = { id: '0a0a0a0a-0000-4000-8000-000000000001', email: 'ada@example.com' };
const answer = { access_token: 'a.b.c', refresh_token: 'r', expires_in: 3600, user };

test('a phone keeps the session in its secure store and nowhere else', async () => {
  process.env.EXPO_PUBLIC_SUPABASE_URL = 'http://127.0.0.1:1';
  process.env.EXPO_PUBLIC_SUPABASE_ANON_KEY = 'key';
  globalThis.fetch = async () => new Response(JSON.stringify(answer));
  const { supabase } = require('../src/supabase') as typeof import('../src/supabase');

  const { error } = await supabase.auth.signInWithPassword({ email: user.email, password: 'x' });

  expect(error).toBeNull();
  expect(mockKeychain.get('session')).toContain('a.b.c');
  expect(await AsyncStorage.getAllKeys()).toEqual([]);
  await supabase.auth.stopAutoRefresh();
});
