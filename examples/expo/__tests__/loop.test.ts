/** One thing done again and again: when asked, when due, after failures. */
import { DarkroomError } from '../src/darkroom';
import { Loop } from '../src/darkroom/loop';

const after = (ms: number) => jest.advanceTimersByTimeAsync(ms);
const lost = () => Promise.reject(new DarkroomError('unreachable', 0, '', true));

let isAwake = true;
const step = jest.fn<Promise<void>, []>();
const ended = jest.fn<void, [boolean]>();
let loop: Loop;

beforeEach(() => {
  jest.useFakeTimers();
  isAwake = true;
  step.mockReset().mockResolvedValue();
  ended.mockReset();
  loop = new Loop(() => isAwake, step, ended);
});

test('does its step once when asked', async () => {
  await loop.now();

  expect(step).toHaveBeenCalledTimes(1);
  expect(ended.mock.calls).toEqual([[true]]);
  expect(jest.getTimerCount()).toBe(0);
});

test('asked while it is busy does it once more, never twice at a time', async () => {
  let finish = () => {};
  step.mockImplementationOnce(() => new Promise((resolve) => (finish = resolve)));

  const done = loop.now();
  void loop.now();
  void loop.now();
  expect(step).toHaveBeenCalledTimes(1);
  finish();
  await done;

  expect(step).toHaveBeenCalledTimes(2);
});

test('does nothing while the app is away', async () => {
  isAwake = false;

  await loop.now();
  loop.within(100);
  await after(1_000);

  expect(step).not.toHaveBeenCalled();
});

test('after a failure comes back no sooner than it was told', async () => {
  step.mockRejectedValueOnce(new DarkroomError('unavailable', 503, '', true, 30_000));

  await loop.now();
  await after(29_999);
  expect(step).toHaveBeenCalledTimes(1);
  await after(1);

  expect(step).toHaveBeenCalledTimes(2);
});

test('keeps to the earliest time it was given', async () => {
  loop.within(500);
  loop.within(200);
  loop.within(900);

  await after(199);
  expect(step).not.toHaveBeenCalled();
  await after(1_000);

  expect(step).toHaveBeenCalledTimes(1);
});

test('forgets when it was due once it was done', async () => {
  loop.within(500);

  await loop.now();
  await after(1_000);

  expect(step).toHaveBeenCalledTimes(1);
});

test('can be due for ever', () => {
  loop.within(Infinity);

  expect(jest.getTimerCount()).toBe(0);
});

test('repeats what failed after 1, 2, 4 ... at most 30 seconds', async () => {
  step.mockImplementation(lost);
  const start = Date.now();
  const times: number[] = [];
  ended.mockImplementation(() => void times.push((Date.now() - start) / 1000));

  void loop.now();
  await after(100_000);

  expect(times).toEqual([0, 1, 3, 7, 15, 31, 61, 91]);
  expect(loop.failures).toBe(8);
});

test('counts from the beginning after a success', async () => {
  step.mockImplementationOnce(lost).mockImplementationOnce(lost);

  void loop.now();
  await after(3_000);

  expect(step).toHaveBeenCalledTimes(3);
  expect(loop.failures).toBe(0);
});

test('repeats at once, and counts nothing, what failed while it was asked again', async () => {
  step.mockImplementationOnce(async () => {
    void loop.now();
    await lost();
  });

  await loop.now();

  expect(step).toHaveBeenCalledTimes(2);
  expect(ended.mock.calls).toEqual([[false], [true]]);
  expect(loop.failures).toBe(0);
});

test('does not count what was cut off while the app is away', async () => {
  step.mockImplementationOnce(async () => {
    isAwake = false;
    await lost();
  });

  await loop.now();

  expect(loop.failures).toBe(0);
});

test('does not hide a mistake, and goes on after it', async () => {
  step.mockRejectedValueOnce(new TypeError('a mistake'));

  await expect(loop.now()).rejects.toThrow('a mistake');
  await after(1_000);

  expect(step).toHaveBeenCalledTimes(2);
});
