/** How large the tiles are and where they go, which is known before there is any picture. */
import type { Job, Params } from '../darkroom';

export interface Place {
  left: number;
  top: number;
  width: number;
  height: number;
}

/** Sides that differ by less than this are not seen, and the picture is cut to the tile. */
const TOLERANCE = 1.1;

function askedRatio({ width, height, ...words }: Params): number | null {
  const said = Object.values(words).map((word) => /^(\d+)[:x](\d+)$/.exec(String(word)));
  const [, across, down] = said.find((found) => found) ?? [null, width, height];
  return Number(across) / Number(down) || null;
}

/**
 * Width by height of the tile: as was asked for, so that nothing moves when the picture comes. The
 * picture's own where that is another shape, or where none was asked for.
 */
export function ratioOf({ params, images: [image] }: Job): number {
  const asked = askedRatio(params);
  const real = image?.width && image.height ? image.width / image.height : null;
  const differs = !asked || !real || Math.max(asked / real, real / asked) > TOLERANCE;
  const ratio = (differs ? (real ?? asked) : asked) ?? 1;
  return Math.min(2, Math.max(0.5, ratio));
}

/** Puts tiles of these heights into columns, in order, each into the shortest. */
export function layOut(heights: readonly number[], columns: number, width: number, gap: number) {
  const tops = Array<number>(columns).fill(0);
  const places = heights.map((height): Place => {
    const top = Math.min(...tops);
    const column = tops.indexOf(top);
    tops[column] = top + height + gap;
    return { left: column * (width + gap), top, width, height };
  });
  return { places, bottom: Math.max(0, Math.max(...tops) - gap) };
}
