/** What cards say, and how many are drawn. */
import { act, render, screen } from '@testing-library/react-native';
import { isBlurhashValid } from 'expo-image/src/utils/blurhash/decode';
import { ScrollView, Text, View } from 'react-native';

import type { Generation, Job } from '../src/darkroom';
import { Columns } from '../src/ui/Columns';
import { latentHash } from '../src/ui/latentHash';
import { isLate } from '../src/ui/words';

const MINUTE = 60_000;
const known = (job: Partial<Job>, more: Partial<Generation> = {}) =>
  ({ key: job.job_id, local: null, job, source: null, ...more }) as Generation;

describe('"taking longer than usual"', () => {
  const asked = { created_at: '2026-01-01T00:00:00Z', poll_after_ms: 1_000 };
  const at = Date.parse(asked.created_at);

  test.each<[string, Generation, number, boolean]>([
    ['not within a minute', known(asked), at + MINUTE, false],
    ['after a minute', known(asked), at + MINUTE + 1, true],
    ['not of what has ended', known({ ...asked, poll_after_ms: null }), at + 2 * MINUTE, false],
    ['not of what was not sent yet', known(asked, { local: 'sending' }), at + 2 * MINUTE, false],
  ])('is said %s', (_, generation, now, isSaid) => {
    expect(isLate(generation, now)).toBe(isSaid);
  });
});

describe('what is on the paper before there is a picture', () => {
  test.each([2, 3, 8])('is a BlurHash, with %i waves', (waves) => {
    expect(isBlurhashValid(latentHash('a seed', waves))).toEqual({ result: true });
  });

  test('is the same for the same seed only', () => {
    expect(latentHash('one', 3)).toBe(latentHash('one', 3));
    expect(latentHash('one', 3)).not.toBe(latentHash('two', 3));
  });

  test('is the same field with more waves', () => {
    const waves = (hash: string, count: number) =>
      [1, 2].map((x) => hash.slice(4 + 2 * x, 6 + 2 * x)).concat(
        hash.slice(4 + 2 * count, 6 + 2 * count), // the first of the second row
      );

    expect(waves(latentHash('a seed', 8), 8)).toEqual(waves(latentHash('a seed', 3), 3));
  });
});

describe('of hundreds of cards', () => {
  const generations = Array.from({ length: 500 }, (_, n) => known({ job_id: `${n}` }));
  const onNearEnd = jest.fn();
  const heightOf = () => 300;
  const drawn = () => screen.getAllByTestId('card').map(({ props }) => Number(props.id));

  async function show(): Promise<void> {
    render(
      <Columns
        generations={generations}
        heightOf={heightOf}
        card={({ key }) => <View testID='card' id={key} />}
        empty={<Text>Nothing</Text>}
        isOnline
        onNearEnd={onNearEnd}
      />,
    );
    const list = screen.UNSAFE_getByType(ScrollView);
    const size = (width: number, height: number) => ({
      nativeEvent: { layout: { width, height } },
    });
    await act(() => list.props.onLayout(size(900, 800)));
    await act(() => screen.UNSAFE_getAllByType(View)[1]!.props.onLayout(size(880, 0)));
  }
  async function scrollTo(y: number): Promise<void> {
    const event = { contentOffset: { y }, layoutMeasurement: { height: 800 } };
    const list = screen.UNSAFE_getByType(ScrollView);
    await act(() => list.props.onScroll({ nativeEvent: event }));
  }

  test('those near the screen are drawn, wherever it is', async () => {
    await show();
    expect(drawn()[0]).toBe(0);
    expect(drawn().length).toBeLessThan(50);

    await scrollTo(20_000);

    expect(drawn().length).toBeLessThan(60);
    expect(Math.min(...drawn())).toBeGreaterThan(200);
    expect(onNearEnd).not.toHaveBeenCalled();
  });

  test('more are asked for before the end is seen', async () => {
    await show();

    await scrollTo(37_000);

    expect(onNearEnd).toHaveBeenCalled();
  });
});
