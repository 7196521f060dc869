/** A darkroom: near black, and a red light. */
export const color = {
  ground: '#140d0c',
  tray: '#1f1513',
  edge: '#3a2622',
  text: '#f6ece6',
  quiet: '#ab968d',
  light: '#ff5c3f',
  onLight: '#1a0805',
  glow: '#ffb35c',
};

export const space = { s: 6, m: 12, l: 20 };
export const CAPTION_HEIGHT = 66;

/** Where one writes. */
export const field = {
  backgroundColor: color.tray,
  borderColor: color.edge,
  borderRadius: 10,
  borderWidth: 1,
  color: color.text,
  fontSize: 16,
  padding: space.m,
};
