/** Tiles in columns, each as high as its picture. Only those near the screen are drawn. */
import { type ReactNode, useEffect, useMemo, useState } from 'react';
import { ScrollView, StyleSheet, View } from 'react-native';

import type { Generation } from '../darkroom';
import { layOut } from './shape';
import { space } from './theme';

const TILE_WIDTH = 210;

interface Props {
  generations: readonly Generation[];
  /** How high a card is that is so wide. */
  heightOf: (generation: Generation, width: number) => number;
  card: (generation: Generation, width: number) => ReactNode;
  empty: ReactNode;
  isOnline: boolean;
  onNearEnd: () => void;
}

export function Columns({ generations, heightOf, card, empty, isOnline, onNearEnd }: Props) {
  const [width, setWidth] = useState(0);
  const [screen, setScreen] = useState(0); // its height
  const [step, setStep] = useState(0); // how far it is scrolled, in halves of a screen

  const columns = Math.max(2, Math.floor((width + space.m) / (TILE_WIDTH + space.m)));
  const tileWidth = Math.floor((width - (columns - 1) * space.m) / columns);
  const { places, bottom } = useMemo(
    () => layOut(generations.map((g) => heightOf(g, tileWidth)), columns, tileWidth, space.m),
    [generations, heightOf, columns, tileWidth],
  );
  const top = (step * screen) / 2;
  const isNear = (from: number, height: number) =>
    from < top + 2.5 * screen && from + height > top - screen;

  // Also when the network is back: the page may be one that did not arrive.
  useEffect(() => {
    if (screen > 0 && bottom < top + 3 * screen) onNearEnd();
  }, [bottom, top, screen, isOnline, onNearEnd]);

  return (
    <ScrollView
      contentContainerStyle={styles.page}
      onLayout={({ nativeEvent: { layout } }) => setScreen(layout.height)}
      onScroll={({ nativeEvent: { contentOffset, layoutMeasurement } }) =>
        setStep(Math.floor((2 * contentOffset.y) / layoutMeasurement.height))}
      scrollEventThrottle={50}
      style={styles.fill}
    >
      <View
        onLayout={({ nativeEvent: { layout } }) => setWidth(layout.width)}
        style={{ height: generations.length ? bottom : 'auto' }}
      >
        {generations.length === 0 && empty}
        {width > 0 && generations.map((generation, at) => {
          const { height, ...place } = places[at]!;
          return isNear(place.top, height) && (
            <View key={generation.key} style={[styles.tile, place, { height }]}>
              {card(generation, tileWidth)}
            </View>
          );
        })}
      </View>
    </ScrollView>
  );
}

const styles = StyleSheet.create({
  fill: { flex: 1 },
  page: { padding: space.l },
  tile: { position: 'absolute' },
});
