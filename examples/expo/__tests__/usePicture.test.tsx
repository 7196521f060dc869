/** Where a phone finds a picture: that in a browser is tried in one, by tests/browser. */
import { renderHook, waitFor } from '@testing-library/react-native';

import { type Client, usePicture } from '../src/darkroom';

let token: string | null = 'a.b.c';
const supabase = {
  auth: {
    getSession: async () => ({ data: { session: token && { access_token: token } } }),
  },
  storage: {
    from: (bucket: string) => ({
      getPublicUrl: (path: string) => ({
        data: { publicUrl: `https://x.test/storage/v1/object/public/${bucket}/${path}` },
      }),
    }),
  },
} as unknown as Client;

const show = (path: string | null) =>
  renderHook(
    (props: { path: string | null; isOnline: boolean }) =>
      usePicture(supabase, props.path, props.isOnline),
    { initialProps: { path, isOnline: true } },
  );

test('it is read with the token of the session and cached under its path', async () => {
  const { result } = show('ada/job/0.png');

  await waitFor(() => expect(result.current).not.toBeNull());

  expect(result.current).toEqual({
    uri: 'https://x.test/storage/v1/object/generations/ada/job/0.png',
    headers: { Authorization: 'Bearer a.b.c' },
    cacheKey: 'ada/job/0.png',
  });
});

test('of two pictures one after the other, the second is never shown as the first', async () => {
  const { result, rerender } = show('first');
  await waitFor(() => expect(result.current).not.toBeNull());

  rerender({ path: 'second', isOnline: true });

  expect(result.current).toBeNull();
  await waitFor(() => expect(result.current).toMatchObject({ cacheKey: 'second' }));
});

test('it is tried again when there is a network, or a session, again', async () => {
  token = null;
  const { result, rerender } = show('first');
  rerender({ path: 'first', isOnline: false });
  expect(result.current).toBeNull();
  token = 'new';

  rerender({ path: 'first', isOnline: true });

  await waitFor(() => expect(result.current?.headers).toEqual({ Authorization: 'Bearer new' }));
});
