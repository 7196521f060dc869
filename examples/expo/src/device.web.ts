/** What a browser does with a picture that leaves the app. */
import type { Picture } from './darkroom';
import { supabase } from './supabase';

const LINK_SECONDS = 7 * 24 * 3600;

export async function save({ uri }: Picture, _path: string, name: string): Promise<void> {
  const link = document.createElement('a');
  link.href = uri;
  link.download = name;
  link.click();
}

/** Hands out a link that works for a week. Answers what to say about it. */
export async function shareLink(path: string): Promise<string | null> {
  const bucket = supabase.storage.from('generations');
  const { data, error } = await bucket.createSignedUrl(path, LINK_SECONDS);
  if (error) throw error;
  const url = data.signedUrl;
  if (!navigator.share) {
    await navigator.clipboard.writeText(url);
    return 'Link copied. It works for 7 days.';
  }
  await navigator.share({ url }).catch((why: Error) => {
    if (why.name !== 'AbortError') throw why; // else it was thought better of
  });
  return null;
}

export async function copyText(text: string): Promise<string | null> {
  await navigator.clipboard.writeText(text);
  return 'Prompt copied.';
}
