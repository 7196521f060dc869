/** The colors can be told apart: WCAG's contrast, of which axe-core knows only that of text. */
import { color } from '../src/ui/theme';

function luminance(hex: string): number {
  const [red = 0, green = 0, blue = 0] = [1, 3, 5].map((at) => {
    const part = parseInt(hex.slice(at, at + 2), 16) / 255;
    return part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

function contrast(...of: [string, string]): number {
  const [dark = 0, bright = 0] = of.map(luminance).sort((a, b) => a - b);
  return (bright + 0.05) / (dark + 0.05);
}

test.each([color.ground, color.tray])('the border of what is pressed stands out on %s', (under) => {
  expect(contrast(color.line, under)).toBeGreaterThanOrEqual(3);
});

test.each([color.light, color.glow, color.text, color.quiet])('%s is legible', (words) => {
  expect(contrast(words, color.ground)).toBeGreaterThanOrEqual(4.5);
  expect(contrast(words, color.tray)).toBeGreaterThanOrEqual(4.5);
});
