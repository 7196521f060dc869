import { Pressable, type StyleProp, StyleSheet, Text, type ViewStyle } from 'react-native';

import { color, space } from './theme';

interface Props {
  title: string;
  onPress: () => void;
  /** `main` is the one thing to do here, `choice` one of several, `quiet` a word among others. */
  kind?: 'main' | 'choice' | 'quiet';
  isChosen?: boolean;
  isDisabled?: boolean;
  style?: StyleProp<ViewStyle>;
}

export function Button({ title, onPress, kind = 'quiet', isChosen, isDisabled, style }: Props) {
  const isLit = kind === 'main' || isChosen;
  return (
    <Pressable
      accessibilityRole='button'
      accessibilityState={{ disabled: !!isDisabled, selected: !!isChosen }}
      disabled={!!isDisabled}
      hitSlop={6}
      onPress={onPress}
      style={({ pressed }) => [
        styles[kind],
        isChosen && styles.chosen,
        (pressed || isDisabled) && styles.dim,
        style,
      ]}
    >
      <Text style={[styles.text, isLit && styles.lit, kind === 'main' && styles.large]}>
        {title}
      </Text>
    </Pressable>
  );
}

const styles = StyleSheet.create({
  main: {
    alignItems: 'center',
    backgroundColor: color.light,
    borderRadius: 10,
    paddingVertical: 14,
  },
  choice: {
    borderColor: color.edge,
    borderRadius: 8,
    borderWidth: 1,
    paddingHorizontal: space.m,
    paddingVertical: 8,
  },
  quiet: { paddingVertical: 2 },
  chosen: { backgroundColor: color.glow, borderColor: color.glow },
  dim: { opacity: 0.45 },
  text: { color: color.glow, fontSize: 14 },
  lit: { color: color.onLight },
  large: { fontSize: 16, fontWeight: '600' },
});
