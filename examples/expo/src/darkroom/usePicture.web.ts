/**
 * An image of the private bucket in a browser, which sends no header for an <img>: it is fetched
 * once and kept under its path, so it also shows without a network.
 */
import { useEffect, useState } from 'react';

import type { Client } from './api';

const CACHE = 'darkroom-pictures';

async function load(supabase: Client, path: string): Promise<Blob | null> {
  const name = `/${path}`;
  const cache = await globalThis.caches?.open(CACHE); // there is none without https
  const kept = await cache?.match(name);
  if (kept) return kept.blob();
  const { data } = await supabase.storage.from('generations').download(path);
  if (data) await cache?.put(name, new Response(data)).catch(() => undefined); // it may be full
  return data;
}

/** Answers null until the picture is here. Tries again when the network is back. */
export function usePicture(supabase: Client, path: string | null, isOnline: boolean) {
  const [source, setSource] = useState<{ uri: string; path: string } | null>(null);
  const isHere = source?.path === path;
  useEffect(() => {
    let isWanted = !isHere && path !== null;
    if (isWanted) {
      void load(supabase, path!).then((picture) => {
        if (picture && isWanted) setSource({ uri: URL.createObjectURL(picture), path: path! });
      });
    }
    return () => {
      isWanted = false;
    };
  }, [supabase, path, isOnline, isHere]);
  useEffect(() => () => URL.revokeObjectURL(source?.uri ?? ''), [source]);
  return isHere ? source : null;
}

/** Forgets all pictures: somebody else may sign in next. */
export async function forgetPictures(): Promise<void> {
  await globalThis.caches?.delete(CACHE);
}
