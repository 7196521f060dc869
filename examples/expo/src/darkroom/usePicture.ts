/**
 * An image of the private bucket on a phone, for expo-image: it sends the header and caches under
 * the path, which stays the same, where a signed address would be a new file every time.
 */
import { Image } from 'expo-image';
import { useEffect, useState } from 'react';

import type { Client } from './api';

/** What an image component takes as its source. */
export interface Picture {
  uri: string;
  headers?: Record<string, string>;
  cacheKey?: string;
}

/** Answers null until it is known where the picture is. Tries again when the network is back. */
export function usePicture(supabase: Client, path: string | null, isOnline: boolean) {
  const [source, setSource] = useState<Picture | null>(null);
  useEffect(() => {
    let isWanted = true;
    void supabase.auth.getSession().then(({ data: { session } }) => {
      if (!isWanted || !path || !session) return;
      const { publicUrl } = supabase.storage.from('generations').getPublicUrl(path).data;
      setSource({
        uri: publicUrl.replace('/object/public/', '/object/'),
        headers: { Authorization: `Bearer ${session.access_token}` },
        cacheKey: path,
      });
    });
    return () => {
      isWanted = false;
    };
  }, [supabase, path, isOnline]);
  return source?.cacheKey === path ? source : null;
}

/** Forgets all pictures: somebody else may sign in next. */
export async function forgetPictures(): Promise<void> {
  await Promise.all([Image.clearDiskCache(), Image.clearMemoryCache()]);
}
