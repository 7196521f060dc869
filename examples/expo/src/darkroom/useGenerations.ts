/** The one hook: everything the user has asked for, and what can be done about it. */
import { useEffect, useSyncExternalStore } from 'react';

import type { GenerationStore } from './store';

export type Snapshot = ReturnType<GenerationStore['getSnapshot']>;

export function useGenerations(store: GenerationStore) {
  useEffect(() => {
    store.start();
    return store.stop;
  }, [store]);
  const snapshot = useSyncExternalStore(store.subscribe, store.getSnapshot, store.getSnapshot);
  const { generate, retry, cancel, loadMore, favorite, remove, restore, share } = store;
  return { ...snapshot, generate, retry, cancel, loadMore, favorite, remove, restore, share };
}
