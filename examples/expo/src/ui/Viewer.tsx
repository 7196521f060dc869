/** One picture at its full size, over everything else, and what can be done with it. */
import { Image } from 'expo-image';
import { useEffect, useMemo, useRef, useState } from 'react';
import {
  Animated,
  Modal,
  PanResponder,
  Platform,
  ScrollView,
  StyleSheet,
  Text,
  useWindowDimensions,
  View,
} from 'react-native';
import { SafeAreaView } from 'react-native-safe-area-context';

import { type Generation, type JobImage, usePicture } from '../darkroom';
import { copyText, save, shareLink } from '../device';
import { supabase } from '../supabase';
import { Button } from './Button';
import { Notice, type Said } from './Notice';
import { color, SIDE_WIDTH, space, WIDE } from './theme';
import { problem } from './words';

/** A picture on its page. */
export interface Page {
  generation: Generation;
  image: JobImage;
}

/** How far a finger goes to turn the page. */
const SWIPE = 60;
/** To browsers it would mean to go back to the page before the app. */
const SIDEWAYS = Platform.OS === 'web' && ({ touchAction: 'pan-y' } as object);

interface Props {
  page: Page;
  /** Null at the ends. */
  previous: Page | null;
  next: Page | null;
  isOnline: boolean;
  onTurn: (to: Page) => void;
  onClose: () => void;
  onUseAsStart: () => void;
  onFavorite: (isFavorite: boolean) => Promise<void>;
  onShare: (isPublic: boolean) => Promise<void>;
  onRemove: () => void;
}

export function Viewer(props: Props) {
  const { page: { generation: { job }, image }, previous, next, isOnline, onTurn, onClose } = props;
  const [said, setSaid] = useState<Said | null>(null);
  const isWide = useWindowDimensions().width >= WIDE;
  const full = usePicture(supabase, image.path, isOnline);
  const preview = usePicture(supabase, image.preview_path, isOnline);
  // Browsers do not draw an SVG that is served as a download, which they all are.
  const drawn = image.content_type === 'image/svg+xml' && Platform.OS === 'web' ? null : full;

  const turn = (to: Page | null) => to && onTurn(to);
  const attempt = (done: Promise<string | null | void>) =>
    void done.then((text) => text && setSaid({ text }), (why) => setSaid({ text: problem(why) }));
  const { dx, swipe } = useSwipe(() => turn(previous), () => turn(next));
  useArrows(() => turn(previous), () => turn(next));

  const name = `${job.prompt.slice(0, 40).replace(/[^\p{L}\p{N}]+/gu, '-')}-${image.position + 1}`;
  const file = name + image.path.slice(image.path.lastIndexOf('.'));
  const count = job.images.length;
  const of = count > 1 ? `Picture ${image.position + 1} of ${count}` : 'Picture';
  return (
    <Modal
      accessibilityLabel={`${of}: ${job.prompt}`}
      animationType='fade'
      onRequestClose={onClose}
      transparent
      visible
    >
      <SafeAreaView style={[styles.page, isWide && styles.wide]}>
        <View style={styles.bar}>
          <Sign title='Close' sign='✕' onPress={onClose} />
          <View style={styles.turns}>
            <Sign
              title='Previous'
              sign='‹'
              isDisabled={!previous}
              onPress={() => turn(previous)}
            />
            {count > 1 && <Text style={styles.quiet}>{image.position + 1} of {count}</Text>}
            <Sign title='Next' sign='›' isDisabled={!next} onPress={() => turn(next)} />
          </View>
          <Sign
            title='Favorite'
            sign={job.is_favorite ? '♥' : '♡'}
            isOn={job.is_favorite}
            onPress={() => attempt(props.onFavorite(!job.is_favorite))}
          />
        </View>
        <View style={styles.picture}>
          <Animated.View
            {...swipe}
            style={[styles.fill, SIDEWAYS, { transform: [{ translateX: dx }] }]}
          >
            <Image
              key={image.path}
              accessibilityLabel={job.prompt}
              contentFit='contain'
              placeholder={preview ?? (image.blurhash ? { blurhash: image.blurhash } : null)}
              placeholderContentFit='contain'
              source={drawn ?? preview}
              style={styles.fill}
            />
          </Animated.View>
          {said && <Notice said={said} onEnd={setSaid} />}
        </View>
        <ScrollView
          contentContainerStyle={styles.words}
          style={isWide ? styles.side : styles.foot}
        >
          <Text role='heading' aria-level={2} selectable style={styles.prompt}>{job.prompt}</Text>
          {image.width && <Text style={styles.quiet}>{image.width} × {image.height} pixels</Text>}
          <View style={styles.actions}>
            <Button
              kind='choice'
              title='Save'
              isDisabled={!full}
              onPress={() => full && attempt(save(full, image.path, file))}
            />
            <Button
              kind='choice'
              title='Share link'
              onPress={() => attempt(shareLink(image.path))}
            />
            <Button
              kind='choice'
              title='Copy prompt'
              onPress={() => attempt(copyText(job.prompt))}
            />
            <Button kind='choice' title='Use as start' onPress={props.onUseAsStart} />
            <Button kind='choice' title='Delete' onPress={props.onRemove} />
          </View>
          <View style={styles.share}>
            <Text style={[styles.quiet, styles.fill]}>
              {image.is_public
                ? 'Everybody sees this picture, without its prompt.'
                : 'Only you see this picture, and whoever has a link. A link works for a week.'}
            </Text>
            <Button
              kind='choice'
              title='Public'
              isChosen={image.is_public}
              onPress={() => attempt(props.onShare(!image.is_public))}
            />
          </View>
        </ScrollView>
      </SafeAreaView>
    </Modal>
  );
}

interface SignProps {
  title: string;
  sign: string;
  isOn?: boolean;
  isDisabled?: boolean;
  onPress: () => void;
}

function Sign({ sign, isOn, ...more }: SignProps) {
  const icon = <Text style={[styles.sign, isOn && styles.on]}>{sign}</Text>;
  const state = isOn !== undefined && { isChosen: isOn };
  return <Button {...more} {...state} icon={icon} style={styles.round} />;
}

/** The picture follows the finger, and turns the page when it was drawn far enough. */
function useSwipe(onRight: () => void, onLeft: () => void) {
  const latest = useRef({ onRight, onLeft });
  latest.current = { onRight, onLeft };
  const dx = useRef(new Animated.Value(0)).current;
  const swipe = useMemo(() =>
    PanResponder.create({
      onMoveShouldSetPanResponder: (_, { dx: x, dy: y }) => Math.abs(x) > 2 * Math.abs(y) + 4,
      onPanResponderMove: (_, { dx: x }) => dx.setValue(x),
      onPanResponderRelease: (_, { dx: x }) => {
        if (x > SWIPE) latest.current.onRight();
        if (x < -SWIPE) latest.current.onLeft();
        Animated.spring(dx, { toValue: 0, useNativeDriver: false }).start();
      },
      onPanResponderTerminate: () => dx.setValue(0),
    }).panHandlers, [dx]);
  return { dx, swipe };
}

function useArrows(onLeft: () => void, onRight: () => void) {
  useEffect(() => {
    if (Platform.OS !== 'web') return;
    const turn = ({ key, altKey, ctrlKey, metaKey }: KeyboardEvent) => {
      if (altKey || ctrlKey || metaKey) return;
      if (key === 'ArrowLeft') onLeft();
      if (key === 'ArrowRight') onRight();
    };
    document.addEventListener('keydown', turn);
    return () => document.removeEventListener('keydown', turn);
  });
}

const styles = StyleSheet.create({
  page: { backgroundColor: color.ground, flex: 1 },
  wide: { paddingRight: SIDE_WIDTH },
  fill: { flex: 1 },
  picture: { flex: 1, marginHorizontal: space.m, marginBottom: space.m },
  bar: {
    alignItems: 'center',
    flexDirection: 'row',
    justifyContent: 'space-between',
    padding: space.s,
  },
  turns: { alignItems: 'center', flexDirection: 'row', gap: space.s },
  round: { alignItems: 'center', backgroundColor: 'transparent', borderRadius: 22 },
  sign: { color: color.text, fontSize: 22, textAlign: 'center' },
  on: { color: color.light },
  side: {
    borderLeftColor: color.edge,
    borderLeftWidth: 1,
    bottom: 0,
    position: 'absolute',
    right: 0,
    top: 0,
    width: SIDE_WIDTH,
  },
  foot: { flexGrow: 0, maxHeight: '45%' },
  words: { gap: space.m, padding: space.l },
  prompt: { color: color.text, fontSize: 16, lineHeight: 23 },
  quiet: { color: color.quiet, fontSize: 13, lineHeight: 18 },
  share: {
    alignItems: 'center',
    borderColor: color.edge,
    borderRadius: 12,
    borderWidth: 1,
    flexDirection: 'row',
    gap: space.m,
    padding: space.m,
  },
  actions: { flexDirection: 'row', flexWrap: 'wrap', gap: space.s },
});
