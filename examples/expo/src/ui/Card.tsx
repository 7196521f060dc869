/**
 * One generation. Its size is known before there is a picture, so that nothing on the page moves
 * when the picture takes the placeholder's place.
 */
import { Image } from 'expo-image';
import { Pressable, StyleSheet, Text, View } from 'react-native';

import { type Generation, usePicture } from '../darkroom';
import { supabase } from '../supabase';
import { Button } from './Button';
import { now } from './clock';
import { Latent } from './Latent';
import { ratioOf } from './shape';
import { CAPTION_HEIGHT, color, space, TARGET } from './theme';
import { duration, progress, reason } from './words';

/** What failed says why, and what can be done: that takes its room, in a narrow card more. */
const failedHeight = (width: number) => (width < 200 ? 264 : 212);

export const heightOf = (generation: Generation, width: number) =>
  trayHeight(generation, width) + CAPTION_HEIGHT;

function trayHeight(generation: Generation, width: number): number {
  const height = Math.round(width / ratioOf(generation.job));
  return reason(generation) === null ? height : Math.max(height, failedHeight(width));
}

interface Props {
  generation: Generation;
  width: number;
  isOnline: boolean;
  hasRetry: boolean;
  onOpen: () => void;
  onCancel: () => void;
  onRetry: () => void;
  onEdit: () => void;
  onRemove: () => void;
}

export function Card(props: Props) {
  const { generation, width } = props;
  const { key, local, job } = generation;
  const isDone = job.status === 'completed';
  return (
    <View testID={`card-${local ?? job.status}`} id={key}>
      <View style={[styles.tray, { height: trayHeight(generation, width) }]}>
        {isDone && <Developed {...props} />}
        {!isDone && (reason(generation) === null ? <Waiting {...props} /> : <Failed {...props} />)}
      </View>
      <Text numberOfLines={2} style={styles.caption}>{job.prompt}</Text>
    </View>
  );
}

function Developed({ generation: { job }, isOnline, onOpen }: Props) {
  const image = job.images[0];
  const source = usePicture(supabase, image ? (image.preview_path ?? image.path) : null, isOnline);
  const more = job.images.length - 1;
  return (
    <Pressable
      accessibilityRole='button'
      accessibilityLabel={`Open: ${job.prompt}`}
      onPress={onOpen}
      style={({ pressed }) => [styles.fill, pressed && styles.pressed]}
    >
      <Image
        accessibilityLabel={job.prompt}
        contentFit='cover'
        placeholder={image?.blurhash ? { blurhash: image.blurhash } : null}
        placeholderContentFit='cover'
        source={source}
        style={styles.fill}
        transition={500}
      />
      {job.is_favorite && <Text aria-label='Favorite' role='img' style={styles.heart}>♥</Text>}
      {more > 0 && <Text style={styles.more}>+{more}</Text>}
    </Pressable>
  );
}

function Waiting({ generation, onCancel }: Props) {
  const { key, local, job } = generation;
  const left = duration(generation, now());
  const percent = job.progress ?? 0;
  const isRunning = !local && job.status === 'processing';
  return (
    <>
      <Latent seed={key} progress={percent} />
      <View style={styles.said}>
        <Text style={styles.progress}>{progress(generation)}</Text>
        {left && <Text style={styles.left}>{left}</Text>}
        {isRunning && (
          <View
            aria-label='Progress'
            aria-valuemax={100}
            aria-valuemin={0}
            aria-valuenow={percent}
            role='progressbar'
            style={styles.track}
          >
            <View style={[styles.done, { width: `${percent}%` }]} />
          </View>
        )}
      </View>
      <Button
        icon={<Text style={styles.cross}>✕</Text>}
        isDisabled={job.cancel_requested}
        onPress={onCancel}
        style={styles.cancel}
        title='Cancel'
      />
    </>
  );
}

function Failed({ generation, hasRetry, onEdit, onRetry, onRemove }: Props) {
  return (
    <View style={styles.failed}>
      <Text numberOfLines={5} style={styles.reason}>{reason(generation)}</Text>
      <View style={styles.actions}>
        {!hasRetry && <Button title='Try again' onPress={onRetry} />}
        <Button title='Edit prompt' onPress={onEdit} />
        <Button title='Remove' onPress={onRemove} />
      </View>
    </View>
  );
}

const styles = StyleSheet.create({
  tray: { backgroundColor: color.tray, borderRadius: 14, overflow: 'hidden' },
  fill: { flex: 1 },
  pressed: { opacity: 0.7 },
  caption: {
    color: color.quiet,
    fontSize: 13,
    height: CAPTION_HEIGHT,
    lineHeight: 18,
    overflow: 'hidden',
    paddingHorizontal: 2,
    paddingTop: space.s,
  },
  heart: {
    bottom: space.s,
    color: color.light,
    fontSize: 18,
    position: 'absolute',
    right: space.m,
    textShadowColor: '#000a',
    textShadowRadius: 6,
  },
  more: {
    backgroundColor: color.shade,
    borderRadius: 10,
    color: color.text,
    fontSize: 13,
    paddingHorizontal: space.s,
    paddingVertical: 2,
    position: 'absolute',
    right: space.s,
    top: space.s,
  },
  said: {
    backgroundColor: '#140d0cc4',
    borderRadius: 10,
    bottom: space.s,
    gap: 2,
    left: space.s,
    paddingHorizontal: space.m,
    paddingVertical: space.s,
    position: 'absolute',
    right: space.s,
  },
  progress: { color: color.text, fontSize: 14, fontVariant: ['tabular-nums'], lineHeight: 19 },
  left: { color: color.glow, fontSize: 13, lineHeight: 18 },
  track: {
    backgroundColor: '#f6ece633',
    borderRadius: 2,
    height: 3,
    marginTop: space.s,
    overflow: 'hidden',
  },
  done: { backgroundColor: color.light, height: 3 },
  cancel: {
    alignItems: 'center',
    borderRadius: TARGET / 2,
    position: 'absolute',
    right: 0,
    top: 0,
  },
  cross: { color: color.text, fontSize: 15 },
  failed: {
    borderColor: color.edge,
    borderRadius: 14,
    borderWidth: 1,
    flex: 1,
    justifyContent: 'space-between',
    paddingBottom: space.s,
    paddingHorizontal: space.m,
    paddingTop: space.m,
  },
  reason: { color: color.text, fontSize: 14, lineHeight: 20 },
  actions: { columnGap: space.l, flexDirection: 'row', flexWrap: 'wrap' },
});
