/** How large tiles are and where they go. */
import type { Job, JobImage, Params } from '../src/darkroom';
import { layOut, ratioOf } from '../src/ui/shape';

const job = (params: Params, size?: [number, number]) => {
  const images = size ? [{ width: size[0], height: size[1] } as JobImage] : [];
  return { params, images } as unknown as Job;
};
const PORTRAIT = { width: 832, height: 1216 };

test.each<[string, Params, number]>([
  ['as width and height', PORTRAIT, 832 / 1216],
  ['as a ratio', { aspect_ratio: '3:2' }, 1.5],
  ['in a word', { size: '1024x1536' }, 1024 / 1536],
  ['in no way', { seed: 7, reuse: true }, 1],
  ['as nonsense', { width: 'wide', height: 0 }, 1],
])('a shape that was asked for %s is known before there is a picture', (_, params, ratio) => {
  expect(ratioOf(job(params))).toBeCloseTo(ratio);
});

test('a tile stays as it is when the picture has nearly the shape that was asked for', () => {
  expect(ratioOf(job(PORTRAIT, [1024, 1536]))).toBe(ratioOf(job(PORTRAIT)));
});

test('a picture of another shape than asked for, or of no asked one, is shown as it is', () => {
  expect(ratioOf(job(PORTRAIT, [1024, 1024]))).toBe(1);
  expect(ratioOf(job({}, [1600, 900]))).toBeCloseTo(16 / 9);
});

test('nothing is higher or wider than twice the other side', () => {
  expect(ratioOf(job({}, [4000, 100]))).toBe(2);
  expect(ratioOf(job({ aspect_ratio: '1:9' }))).toBe(0.5);
});

test('tiles go into the shortest column, in order, and lie on one another nowhere', () => {
  const heights = Array.from({ length: 300 }, (_, n) => 100 + ((n * 7919) % 250));

  const { places, bottom } = layOut(heights, 4, 200, 12);

  const tops = places.map(({ top }) => top);
  expect(tops).toEqual([...tops].sort((a, b) => a - b));
  expect(places.map(({ height }) => height)).toEqual(heights);
  for (const [n, a] of places.entries()) {
    const below = places.slice(n + 1).filter(({ left }) => left === a.left);
    expect(below.every(({ top }) => top >= a.top + a.height + 12)).toBe(true);
  }
  const ends = places.map(({ top, height }) => top + height);
  expect(bottom).toBe(Math.max(...ends));
  const lasts = [0, 212, 424, 636].map((left) =>
    Math.max(...ends.filter((_, n) => places[n]!.left === left))
  );
  expect(Math.max(...lasts) - Math.min(...lasts)).toBeLessThan(350);
});

test('nothing takes no room', () => {
  expect(layOut([], 2, 200, 12)).toEqual({ places: [], bottom: 0 });
});
