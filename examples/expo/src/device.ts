/** What a phone does with a picture that leaves the app: it opens the sheet of the system. */
import { File, Paths } from 'expo-file-system';
import { Linking, Platform, Share } from 'react-native';

import type { Picture } from './darkroom';
import { supabase } from './supabase';

const LINK_SECONDS = 7 * 24 * 3600;

const signed = async (path: string, options?: { download: string }) => {
  const bucket = supabase.storage.from('generations');
  const { data, error } = await bucket.createSignedUrl(path, LINK_SECONDS, options);
  if (error) throw error;
  return data.signedUrl;
};

/** The sheet of iOS saves and sends files; that of Android takes none, so its browser saves it. */
export async function save({ uri, headers = {} }: Picture, path: string, name: string) {
  if (Platform.OS !== 'ios') return void Linking.openURL(await signed(path, { download: name }));
  const file = new File(Paths.cache, name);
  if (file.exists) file.delete();
  await File.downloadFileAsync(uri, file, { headers });
  await Share.share({ url: file.uri });
}

/** Hands out a link that works for a week. Answers what to say about it. */
export async function shareLink(path: string): Promise<string | null> {
  const url = await signed(path);
  await Share.share(Platform.OS === 'ios' ? { url } : { message: url });
  return null;
}

/** The sheet has "Copy": a clipboard would be one native module more. */
export async function copyText(message: string): Promise<string | null> {
  await Share.share({ message });
  return null;
}
