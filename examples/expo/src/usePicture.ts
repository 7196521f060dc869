/**
 * An image of a private bucket, for expo-image: it sends the header and caches under the path,
 * which stays the same, where a signed address would be a new file every time.
 */
import { Image, type ImageSource } from 'expo-image';
import { useEffect, useState } from 'react';

import { supabase } from './supabase';

/** Answers null until it is known where the picture is. Tries again when the network is back. */
export function usePicture(path: string | null, isOnline: boolean): ImageSource | null {
  const [source, setSource] = useState<ImageSource | null>(null);
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
  }, [path, isOnline]);
  return source;
}

/** Forgets all pictures: somebody else may sign in next. */
export async function forgetPictures(): Promise<void> {
  await Promise.all([Image.clearDiskCache(), Image.clearMemoryCache()]);
}
