/**
 * One generation. Its size depends on nothing but its width, so that nothing on the page moves when
 * the picture takes the placeholder's place.
 */
import { Image } from 'expo-image';
import { Pressable, StyleSheet, Text, View } from 'react-native';

import type { Generation } from '../darkroom';
import { usePicture } from '../darkroom';
import { Button } from './Button';
import { CAPTION_HEIGHT, color, space } from './theme';
import { progress, reason } from './words';

interface Props {
  generation: Generation;
  width: number;
  isOnline: boolean;
  hasRetry: boolean;
  onOpen: () => void;
  onCancel: () => void;
  onRetry: () => void;
  onEdit: () => void;
}

export function Card({ generation, width, isOnline, hasRetry, onOpen, onCancel, onRetry }: Props) {
  const { key, local, job } = generation;
  const state = local ?? job.status;
  return (
    <View testID={`card-${state}`} id={key} style={{ width }}>
      {job.status === 'completed'
        ? <Developed generation={generation} size={width} isOnline={isOnline} onOpen={onOpen} />
        : (
          <View style={[styles.tray, { height: width }]}>
            <Undeveloped
              generation={generation}
              hasRetry={hasRetry}
              onCancel={onCancel}
              onRetry={onRetry}
            />
          </View>
        )}
      <Text numberOfLines={2} style={styles.caption}>
        {job.prompt}
      </Text>
    </View>
  );
}

function Developed({
  generation: { job },
  size,
  isOnline,
  onOpen,
}: Pick<Props, 'generation' | 'isOnline' | 'onOpen'> & { size: number }) {
  const image = job.images[0];
  const source = usePicture(image ? (image.preview_path ?? image.path) : null, isOnline);
  return (
    <Pressable
      accessibilityRole='button'
      accessibilityLabel={`Open: ${job.prompt}`}
      onPress={onOpen}
    >
      <Image
        accessibilityLabel={job.prompt}
        contentFit='cover'
        placeholder={image?.blurhash ? { blurhash: image.blurhash } : null}
        source={source}
        style={[styles.tray, { height: size, width: size }]}
        transition={250}
      />
    </Pressable>
  );
}

function Undeveloped({
  generation,
  hasRetry,
  onCancel,
  onRetry,
}: Pick<Props, 'generation' | 'hasRetry' | 'onCancel' | 'onRetry'>) {
  const { local, job } = generation;
  const why = reason(generation);
  if (why !== null) {
    return (
      <>
        <Text style={styles.reason}>{why}</Text>
        <View style={styles.actions}>
          {!hasRetry && <Button title='Try again' onPress={onRetry} />}
          {local === 'refused' && <Button title='Dismiss' onPress={onCancel} />}
        </View>
      </>
    );
  }
  return (
    <>
      <View style={styles.track}>
        <View style={[styles.done, { width: `${job.progress ?? 0}%` }]} />
      </View>
      <Text style={styles.progress}>{progress(generation)}</Text>
      <View style={styles.actions}>
        <Button title='Cancel' isDisabled={job.cancel_requested} onPress={onCancel} />
      </View>
    </>
  );
}

const styles = StyleSheet.create({
  tray: {
    backgroundColor: color.tray,
    borderColor: color.edge,
    borderRadius: 12,
    borderWidth: 1,
    justifyContent: 'center',
    overflow: 'hidden',
  },
  caption: {
    color: color.quiet,
    fontSize: 13,
    height: CAPTION_HEIGHT,
    lineHeight: 18,
    overflow: 'hidden',
    paddingTop: space.s,
  },
  reason: { color: color.text, fontSize: 14, lineHeight: 19, paddingHorizontal: space.m },
  progress: { color: color.text, fontSize: 14, lineHeight: 19, paddingHorizontal: space.m },
  actions: { flexDirection: 'row', gap: space.l, paddingHorizontal: space.m, paddingTop: space.s },
  track: {
    backgroundColor: color.edge,
    height: 3,
    left: 0,
    position: 'absolute',
    right: 0,
    top: 0,
  },
  done: { backgroundColor: color.light, height: 3 },
});
