/**
 * The BlurHash of no picture: under the red light, the same for the same seed. With more waves it
 * is the same field, sharper. Format: https://github.com/woltapp/blurhash/blob/master/Algorithm.md
 */
const DIGITS =
  '0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz#$%*+,-.:;=?@[]^_{|}~';
const GROUND = 0x8f3a26;
const CONTRAST = 34;
/** How much of a wave is red, green and blue. */
const LIGHT = [1, 0.62, 0.5];

function encode(value: number, length: number): string {
  const rest = length > 1 ? encode(Math.floor(value / 83), length - 1) : '';
  return rest + DIGITS[value % 83]!;
}

/** From -1 to 1, by chance and always the same. */
function noise(seed: string, x: number, y: number): number {
  let hash = 2166136261;
  for (const char of `${x} ${y} ${seed}`) hash = Math.imul(hash ^ char.charCodeAt(0), 16777619);
  hash = Math.imul(hash ^ (hash >>> 15), 2246822519);
  return ((hash ^ (hash >>> 13)) >>> 0) / 2 ** 31 - 1;
}

export function latentHash(seed: string, waves: number): string {
  let hash = encode(10 * (waves - 1), 1) + encode(CONTRAST, 1) + encode(GROUND, 4);
  for (let y = 0; y < waves; y += 1) {
    for (let x = y === 0 ? 1 : 0; x < waves; x += 1) {
      const height = noise(seed, x, y) / Math.hypot(x, y) ** 0.6;
      const digits = LIGHT.map((part) => 9 + Math.round(9 * height * part));
      hash += encode(digits.reduce((sum, digit) => sum * 19 + digit, 0), 2);
    }
  }
  return hash;
}
