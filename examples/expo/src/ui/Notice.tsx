/** A word at the foot of the screen that goes by itself, and perhaps a way back. */
import { useEffect } from 'react';
import { StyleSheet, Text, View } from 'react-native';

import { Button } from './Button';
import { color, space } from './theme';

const SHOWN_MS = 5_000; // twice that where there is something to do

export interface Said {
  text: string;
  undo?: () => void;
}

/** `onEnd` is to stay the same: with a new one the time begins anew. */
export function Notice({ said, onEnd }: { said: Said; onEnd: (nothing: null) => void }) {
  useEffect(() => {
    const timer = setTimeout(() => onEnd(null), said.undo ? 2 * SHOWN_MS : SHOWN_MS);
    return () => clearTimeout(timer);
  }, [said, onEnd]);
  const { text, undo } = said;
  return (
    <View pointerEvents='box-none' style={styles.foot}>
      <View aria-live='polite' role='status' style={styles.bar}>
        <Text style={styles.text}>{text}</Text>
        <Button
          title={undo ? 'Undo' : 'OK'}
          onPress={() => {
            onEnd(null);
            undo?.();
          }}
        />
      </View>
    </View>
  );
}

const styles = StyleSheet.create({
  foot: { ...StyleSheet.absoluteFill, alignItems: 'center', justifyContent: 'flex-end' },
  bar: {
    alignItems: 'center',
    backgroundColor: color.edge,
    borderColor: color.line,
    borderRadius: 12,
    borderWidth: 1,
    flexDirection: 'row',
    gap: space.l,
    margin: space.l,
    paddingHorizontal: space.l,
    paddingVertical: space.s,
  },
  text: { color: color.text, flexShrink: 1, fontSize: 15 },
});
