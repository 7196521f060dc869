/** A darkroom: near black, and a red light. */
export const color = {
  ground: '#140d0c',
  tray: '#1f1513',
  /** Between things; what is to be pressed or filled in has a `line`, which stands out 3 to 1. */
  edge: '#3a2622',
  line: '#8a6d63',
  text: '#f6ece6',
  quiet: '#ab968d',
  light: '#ff5c3f',
  onLight: '#1a0805',
  glow: '#ffb35c',
  shade: '#0b0606f2',
};

export const space = { s: 6, m: 12, l: 20 };
export const CAPTION_HEIGHT = 50;

/** No smaller is what a finger has to meet. */
export const TARGET = 44;

/** From this width of the window on there is a column at its side, this wide. */
export const WIDE = 860;
export const SIDE_WIDTH = 340;

/** Where one writes. */
export const field = {
  backgroundColor: color.tray,
  borderColor: color.line,
  borderRadius: 10,
  borderWidth: 1,
  color: color.text,
  fontSize: 16,
  minHeight: TARGET,
  padding: space.m,
};
