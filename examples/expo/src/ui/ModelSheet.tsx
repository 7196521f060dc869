/** All models there are, to choose one from. */
import { useState } from 'react';
import {
  KeyboardAvoidingView,
  Modal,
  Pressable,
  ScrollView,
  StyleSheet,
  Text,
  TextInput,
  View,
} from 'react-native';

import type { Entitlement, Model } from '../darkroom';
import { canUse, takesPicture } from '../draft';
import { Button } from './Button';
import { color, field, space } from './theme';
import { notice, price } from './words';

/** So many are seen at a glance. */
const WITHOUT_SEARCH = 10;

interface Props {
  models: readonly Model[];
  chosen: Model | undefined;
  entitlement: Entitlement | null;
  onChoose: (model: Model) => void;
  onClose: () => void;
}

export function ModelSheet({ models, chosen, entitlement, onChoose, onClose }: Props) {
  const [sought, setSought] = useState('');
  const found = models.filter(({ id, title }) =>
    `${title} ${id}`.toLowerCase().includes(sought.trim().toLowerCase())
  );
  return (
    <Modal
      accessibilityLabel='Choose a model'
      animationType='fade'
      onRequestClose={onClose}
      transparent
    >
      <Pressable aria-hidden onPress={onClose} style={styles.shade} tabIndex={-1} />
      <KeyboardAvoidingView behavior='padding' pointerEvents='box-none' style={styles.page}>
        <View style={styles.sheet}>
          <View style={styles.head}>
            <Text aria-level={2} role='heading' style={styles.title}>Choose a model</Text>
            <Button title='Close' onPress={onClose} />
          </View>
          {models.length > WITHOUT_SEARCH && (
            <TextInput
              accessibilityLabel='Search models'
              autoCapitalize='none'
              autoCorrect={false}
              onChangeText={setSought}
              placeholder='Search'
              placeholderTextColor={color.quiet}
              style={styles.search}
              value={sought}
            />
          )}
          <ScrollView keyboardShouldPersistTaps='handled' testID='models'>
            {found.map((model) => (
              <Row
                key={model.id}
                model={model}
                entitlement={entitlement}
                isChosen={model === chosen}
                onPress={() => onChoose(model)}
              />
            ))}
            {found.length === 0 && <Text style={styles.none}>No model is called that.</Text>}
          </ScrollView>
        </View>
      </KeyboardAvoidingView>
    </Modal>
  );
}

function Row(
  { model, entitlement, isChosen, onPress }:
    & { model: Model; isChosen: boolean; onPress: () => void }
    & Pick<Props, 'entitlement'>,
) {
  const isOff = !canUse(model, entitlement);
  const about = notice(model, entitlement) ??
    (takesPicture(model) ? 'Can start from a picture' : null);
  return (
    <Pressable
      accessibilityRole='button'
      accessibilityState={{ disabled: isOff, selected: isChosen }}
      {...{ 'aria-pressed': isChosen }}
      disabled={isOff}
      onPress={onPress}
      style={({ pressed }) => [styles.row, isChosen && styles.chosen, pressed && styles.pressed]}
    >
      <View style={styles.words}>
        <Text style={[styles.name, isOff && styles.off]}>{model.title}</Text>
        {about && <Text style={styles.about}>{about}</Text>}
      </View>
      <Text style={[styles.price, isOff && styles.off]}>{price(model, entitlement)}</Text>
    </Pressable>
  );
}

const styles = StyleSheet.create({
  shade: { ...StyleSheet.absoluteFill, backgroundColor: color.shade, opacity: 0.8 },
  page: { alignItems: 'center', flex: 1, justifyContent: 'center', padding: space.l },
  sheet: {
    backgroundColor: color.tray,
    borderColor: color.edge,
    borderRadius: 16,
    borderWidth: 1,
    gap: space.s,
    maxHeight: '100%',
    maxWidth: 480,
    padding: space.m,
    width: '100%',
  },
  head: { alignItems: 'center', flexDirection: 'row', paddingHorizontal: space.m },
  title: { color: color.text, flex: 1, fontSize: 18, fontWeight: '600' },
  search: { ...field, backgroundColor: color.ground, marginHorizontal: space.m },
  row: {
    alignItems: 'center',
    borderColor: 'transparent',
    borderRadius: 10,
    borderWidth: 1,
    flexDirection: 'row',
    gap: space.m,
    minHeight: 56,
    paddingHorizontal: space.m,
    paddingVertical: space.s,
  },
  chosen: { backgroundColor: color.edge, borderColor: color.glow },
  pressed: { opacity: 0.5 },
  words: { flex: 1, gap: 2 },
  name: { color: color.text, fontSize: 15 },
  about: { color: color.quiet, fontSize: 13 },
  price: { color: color.text, fontSize: 14, fontVariant: ['tabular-nums'] },
  off: { color: color.quiet },
  none: { color: color.quiet, fontSize: 15, padding: space.l, textAlign: 'center' },
});
