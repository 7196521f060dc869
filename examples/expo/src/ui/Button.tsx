import type { ReactNode } from 'react';
import { Pressable, type StyleProp, StyleSheet, Text, type ViewStyle } from 'react-native';

import { color, space, TARGET } from './theme';

interface Props {
  title: string;
  onPress: () => void;
  /** `main` is the one thing to do here, `choice` one of several, `quiet` a word among others. */
  kind?: 'main' | 'choice' | 'quiet';
  /** Shown in the place of the title. */
  icon?: ReactNode;
  /** Of what is on or off. */
  isChosen?: boolean;
  isDisabled?: boolean;
  style?: StyleProp<ViewStyle>;
}

export function Button(
  { title, onPress, kind = 'quiet', icon, isChosen, isDisabled, style }: Props,
) {
  const isLit = !isDisabled && (kind === 'main' || isChosen);
  const inBrowsers = { 'aria-pressed': isChosen }; // their word for selected
  return (
    <Pressable
      accessibilityRole='button'
      accessibilityState={{ disabled: !!isDisabled, selected: !!isChosen }}
      {...inBrowsers}
      aria-label={icon ? title : undefined}
      disabled={!!isDisabled}
      onPress={onPress}
      style={({ pressed }) => [
        styles.any,
        styles[kind],
        isChosen && styles.chosen,
        pressed && styles.pressed,
        isDisabled && (kind === 'main' ? styles.off : styles.pressed),
        style,
      ]}
    >
      {icon ?? (
        <Text
          style={[
            styles.text,
            isLit && styles.lit,
            kind === 'main' && styles.large,
            kind === 'main' && isDisabled && styles.offText,
          ]}
        >
          {title}
        </Text>
      )}
    </Pressable>
  );
}

const styles = StyleSheet.create({
  any: { justifyContent: 'center', minHeight: TARGET, minWidth: TARGET },
  main: {
    alignItems: 'center',
    backgroundColor: color.light,
    borderRadius: 10,
    minHeight: 50,
    paddingHorizontal: space.m,
  },
  choice: {
    alignItems: 'center',
    borderColor: color.line,
    borderRadius: 10,
    borderWidth: 1,
    paddingHorizontal: space.m,
  },
  quiet: {},
  chosen: { backgroundColor: color.glow, borderColor: color.glow },
  pressed: { opacity: 0.5 },
  off: { backgroundColor: color.edge },
  text: { color: color.glow, fontSize: 14 },
  lit: { color: color.onLight },
  large: { fontSize: 16, fontWeight: '600' },
  offText: { color: color.quiet },
});
