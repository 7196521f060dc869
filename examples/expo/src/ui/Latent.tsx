/**
 * What is on the paper before there is a picture: a blurred field that moves calmly, and gets
 * lighter and sharper with the progress. Still for who wants less motion.
 */
import { Image } from 'expo-image';
import { useEffect, useMemo, useRef, useState } from 'react';
import { AccessibilityInfo, Animated, Easing, Platform, StyleSheet, View } from 'react-native';

import { latentHash } from './latentHash';
import { color } from './theme';

const SWAY_MS = 7_000;
const useNativeDriver = Platform.OS !== 'web';

export function Latent({ seed, progress }: { seed: string; progress: number }) {
  const isStill = useReducedMotion();
  const sway = useRef(new Animated.Value(0)).current;
  const shown = useRef(new Animated.Value(progress)).current;
  const coarse = useMemo(() => ({ blurhash: latentHash(seed, 3) }), [seed]);
  const fine = useMemo(() => ({ blurhash: latentHash(seed, 8) }), [seed]);

  useEffect(() => {
    if (isStill) return;
    const go = (toValue: number) =>
      Animated.timing(sway, {
        toValue,
        duration: SWAY_MS,
        easing: Easing.inOut(Easing.sin),
        useNativeDriver,
      });
    const motion = Animated.loop(Animated.sequence([go(1), go(0)]));
    motion.start();
    return () => motion.stop();
  }, [isStill, sway]);
  useEffect(() => {
    const duration = isStill ? 0 : 900;
    Animated.timing(shown, { toValue: progress, duration, useNativeDriver }).start();
  }, [isStill, progress, shown]);

  const between = (from: number | string, to: number | string) =>
    sway.interpolate({ inputRange: [0, 1], outputRange: [from, to] as string[] });
  const at = (from: number, to: number) =>
    shown.interpolate({ inputRange: [0, 100], outputRange: [from, to] });
  const drift = [
    { scale: between(1.25, 1.5) },
    { rotate: between('-5deg', '6deg') },
    { translateX: between('-6%', '6%') },
  ];
  return (
    <View aria-hidden pointerEvents='none' style={styles.paper}>
      <Animated.View style={[StyleSheet.absoluteFill, { opacity: at(0.6, 1), transform: drift }]}>
        <Image placeholder={coarse} placeholderContentFit='cover' style={styles.layer} />
        <Animated.View style={[StyleSheet.absoluteFill, { opacity: at(0, 1) }]}>
          <Image placeholder={fine} placeholderContentFit='cover' style={styles.layer} />
        </Animated.View>
      </Animated.View>
    </View>
  );
}

/** Whether things should keep still, which they do until it is known. */
export function useReducedMotion(): boolean {
  const [isReduced, setIsReduced] = useState(true);
  useEffect(() => {
    void AccessibilityInfo.isReduceMotionEnabled().then(setIsReduced);
    const listener = AccessibilityInfo.addEventListener('reduceMotionChanged', setIsReduced);
    return () => listener?.remove();
  }, []);
  return isReduced;
}

const styles = StyleSheet.create({
  paper: { ...StyleSheet.absoluteFill, backgroundColor: color.tray, overflow: 'hidden' },
  layer: { flex: 1 },
});
