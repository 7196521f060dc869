/** Where a phone keeps the session: encrypted, with the key in the Keychain or Keystore. */
import * as SecureStore from 'expo-secure-store';

export const sessionStorage = {
  getItem: (name: string) => SecureStore.getItemAsync(name),
  setItem: (name: string, value: string) => SecureStore.setItemAsync(name, value),
  removeItem: (name: string) => SecureStore.deleteItemAsync(name),
};
