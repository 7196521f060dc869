/** The one hook. */
import { act, renderHook } from '@testing-library/react-native';
import { StrictMode } from 'react';

import { type GenerationStore, useGenerations } from '../src/darkroom';
import { FakePhone, FakeServer, MODEL } from './fakeServer';

let server: FakeServer;
let phone: FakePhone;

const after = (ms: number) => act(() => jest.advanceTimersByTimeAsync(ms));

/** The app is open, and its screen has read what there was. */
async function show(wrapper?: typeof StrictMode) {
  phone.open();
  phone.store.stop();
  const screen = renderHook(() => useGenerations(phone.store), wrapper && { wrapper });
  await after(10);
  return screen;
}

beforeEach(() => {
  jest.useFakeTimers();
  server = new FakeServer();
  phone = new FakePhone(server);
});

test('shows what the server has', async () => {
  server.addHistory(2);

  const { result } = await show();

  expect(result.current).toMatchObject({ credits: 10, hasMore: false, isOnline: true });
  expect(result.current.generations.map(({ job }) => job.prompt)).toEqual(['older 1', 'older 0']);
});

test('shows a placeholder at once, then the job in its place', async () => {
  const { result } = await show();

  act(() => void result.current.generate(MODEL, 'a lighthouse', {}));
  expect(result.current.generations).toMatchObject([{ local: 'sending' }]);
  await after(10);

  expect(result.current.generations).toMatchObject([{ local: null, job: { status: 'queued' } }]);
});

test('follows the job to its end', async () => {
  const { result } = await show();
  act(() => void result.current.generate(MODEL, 'a lighthouse', {}));
  await after(10);

  server.complete();
  await after(2_000);

  expect(result.current.generations).toMatchObject([{ job: { status: 'completed' } }]);
});

test('cancels, asks again and shows more', async () => {
  server.addHistory(25);
  const { result } = await show();
  act(() => void result.current.generate(MODEL, 'a lighthouse', {}));
  await after(10);

  act(() => void result.current.cancel(result.current.generations[0]!.key));
  await after(2_000);
  act(() => result.current.retry(result.current.generations[0]!.key));
  act(() => void result.current.loadMore());
  await after(10);

  const statuses = result.current.generations.map(({ job }) => job.status);
  expect(statuses.slice(0, 3)).toEqual(['queued', 'canceled', 'completed']);
  expect(statuses).toHaveLength(27);
});

test('draws once for a page of many', async () => {
  server.addHistory(20);
  let draws = 0;
  phone.open();
  phone.store.stop();

  renderHook(() => ((draws += 1), useGenerations(phone.store)));
  await after(10);

  expect(draws).toBeLessThanOrEqual(6);
});

test('asks nothing any more when the screen is gone', async () => {
  const { result, unmount } = await show();
  act(() => void result.current.generate(MODEL, 'a lighthouse', {}));
  await after(10);
  phone.forgetRequests();

  unmount();
  await after(60_000);

  expect(phone.count()).toBe(0);
  expect(phone.listening()).toBe(0);
});

test('works where React mounts everything twice', async () => {
  const { result } = await show(StrictMode);

  act(() => void result.current.generate(MODEL, 'a lighthouse', {}));
  await after(10);

  expect(phone.listening()).toBe(1);
  expect(server.jobs).toHaveLength(1);
  expect(result.current.generations).toMatchObject([{ local: null }]);
});

test('goes over to the store of another user', async () => {
  const first = phone;
  phone.open();
  phone.store.stop();
  const second = new FakePhone(new FakeServer());
  second.server.addHistory(1);
  second.open();
  second.store.stop();
  const screen = renderHook((store: GenerationStore) => useGenerations(store), {
    initialProps: first.store,
  });
  await after(10);

  screen.rerender(second.store);
  await after(10);

  expect(screen.result.current.generations).toHaveLength(1);
  expect([first.listening(), second.listening()]).toEqual([0, 1]);
});
