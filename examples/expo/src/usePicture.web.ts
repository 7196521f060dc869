/**
 * An image of a private bucket, for a browser, which sends no header for an <img>: it is fetched
 * once and kept under its path, so it also shows without a network.
 */
import type { ImageSource } from 'expo-image';
import { useEffect, useState } from 'react';

import { supabase } from './supabase';

const CACHE = 'darkroom-pictures';

async function load(path: string): Promise<Blob | null> {
  const name = `/${path}`;
  const cache = await caches.open(CACHE);
  const kept = await cache.match(name);
  if (kept) return kept.blob();
  const { data } = await supabase.storage.from('generations').download(path);
  if (data) await cache.put(name, new Response(data));
  return data;
}

/** Answers null until the picture is here. Tries again when the network is back. */
export function usePicture(path: string | null, isOnline: boolean): ImageSource | null {
  const [source, setSource] = useState<ImageSource | null>(null);
  useEffect(() => {
    let uri: string | null = null;
    let isWanted = true;
    void (path ? load(path) : Promise.resolve(null)).then((picture) => {
      if (!picture || !isWanted) return;
      uri = URL.createObjectURL(picture);
      setSource({ uri });
    });
    return () => {
      isWanted = false;
      if (uri) URL.revokeObjectURL(uri);
    };
  }, [path, isOnline]);
  return source;
}

/** Forgets all pictures: somebody else may sign in next. */
export async function forgetPictures(): Promise<void> {
  await caches.delete(CACHE);
}
