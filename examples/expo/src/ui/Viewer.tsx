/** A picture at its full size, over everything else. */
import { Image } from 'expo-image';
import { Modal, Pressable, StyleSheet, Text, View } from 'react-native';

import type { Job, JobImage } from '../darkroom';
import { usePicture } from '../darkroom';
import { Button } from './Button';
import { color, space } from './theme';

interface Props {
  job: Job;
  isOnline: boolean;
  onClose: () => void;
  onUseAsStart: (path: string) => void;
}

export function Viewer({ job, isOnline, onClose }: Props) {
  return (
    <Modal animationType='fade' onRequestClose={onClose} transparent visible>
      <Pressable accessibilityLabel='Close' onPress={onClose} style={styles.shade} />
      <View pointerEvents='box-none' style={styles.page}>
        <View pointerEvents='box-none' style={styles.pictures}>
          {job.images.map((image) => (
            <Picture key={image.path} image={image} label={job.prompt} isOnline={isOnline} />
          ))}
        </View>
        <Text style={styles.prompt}>{job.prompt}</Text>
        <Button title='Close' onPress={onClose} />
      </View>
    </Modal>
  );
}

/** The preview, which the gallery has shown already, until the full picture is here. */
function Picture(
  { image, label, isOnline }: { image: JobImage; label: string; isOnline: boolean },
) {
  // Browsers do not draw an SVG that is served as a download, which they all are.
  const isDrawn = image.content_type !== 'image/svg+xml';
  const full = usePicture(isDrawn ? image.path : null, isOnline);
  const preview = usePicture(image.preview_path, isOnline);
  return (
    <Image
      accessibilityLabel={label}
      contentFit='contain'
      placeholder={preview}
      placeholderContentFit='contain'
      source={full ?? preview}
      style={styles.picture}
    />
  );
}

const styles = StyleSheet.create({
  shade: { ...StyleSheet.absoluteFill, backgroundColor: '#0b0606f2' },
  page: { alignItems: 'center', flex: 1, gap: space.m, justifyContent: 'center', padding: space.l },
  pictures: { flex: 1, flexDirection: 'row', gap: space.m, width: '100%' },
  picture: { flex: 1 },
  prompt: { color: color.text, fontSize: 15, maxWidth: 700, textAlign: 'center' },
});
