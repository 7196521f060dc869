/** What to ask for: prompt, model with its price, shape, and a picture to start from. */
import { Image } from 'expo-image';
import { launchImageLibraryAsync } from 'expo-image-picker';
import { type Ref, useState } from 'react';
import { Pressable, ScrollView, StyleSheet, Text, TextInput, View } from 'react-native';

import { type Model, priceOf, type Snapshot, usePicture } from '../darkroom';
import * as drafts from '../draft';
import { supabase } from '../supabase';
import { Button } from './Button';
import { ModelSheet } from './ModelSheet';
import { color, field, space } from './theme';
import { lacking, notice, price } from './words';

const SOURCE_TYPES = ['image/jpeg', 'image/png', 'image/webp'];

interface Props {
  darkroom: Pick<Snapshot, 'models' | 'entitlement' | 'credits' | 'isOnline'>;
  draft: drafts.Draft;
  change: (news: Partial<drafts.Draft>) => void;
  chooseModel: (model: Model) => void;
  generate: (model: Model, draft: drafts.Draft) => void;
  promptRef: Ref<TextInput>;
  promptHeight: number;
}

export function Composer(
  { darkroom, draft, change, chooseModel, generate, promptRef, promptHeight }: Props,
) {
  const [isChoosing, setIsChoosing] = useState(false);
  const [problem, setProblem] = useState('');

  const { models, entitlement, credits, isOnline } = darkroom;
  const offered = drafts.offered(models, entitlement, draft);
  const model = drafts.modelOf(draft, offered, entitlement);
  const costs = model ? priceOf(model, entitlement) : 0;
  const nothing = draft.start ? 'No model can start from a picture now.' : null;
  const why = model ? notice(model, entitlement) ?? lacking(costs, credits) : nothing;
  const isReady = !!model && !why && draft.prompt.trim() !== '';

  async function pick() {
    const { assets } = await launchImageLibraryAsync({ mediaTypes: ['images'], quality: 0.9 });
    const asset = assets?.[0];
    if (!asset) return;
    const contentType = asset.mimeType ?? 'image/jpeg';
    const isTaken = SOURCE_TYPES.includes(contentType);
    setProblem(isTaken ? '' : 'Only JPEG, PNG and WebP pictures can be used.');
    if (isTaken) change({ start: { uri: asset.uri, contentType } });
  }

  return (
    <>
      <ScrollView
        contentContainerStyle={styles.fields}
        keyboardShouldPersistTaps='handled'
        style={styles.scroll}
        testID='panel'
      >
        <TextInput
          accessibilityLabel='Prompt'
          multiline
          onChangeText={(prompt) => change({ prompt })}
          placeholder='Describe a picture'
          placeholderTextColor={color.quiet}
          ref={promptRef}
          style={[styles.prompt, { height: promptHeight }]}
          value={draft.prompt}
        />
        {draft.start && (
          <StartPicture
            start={draft.start}
            isOnline={isOnline}
            onRemove={() => change({ start: null })}
          />
        )}
        {model && (
          <Pressable
            accessibilityRole='button'
            onPress={() => setIsChoosing(true)}
            style={({ pressed }) => [styles.model, pressed && styles.pressed]}
          >
            <View style={styles.title}>
              <Text style={styles.label}>Model · {price(model, entitlement)}</Text>
              <Text numberOfLines={1} style={styles.name}>{model.title}</Text>
            </View>
            <View style={styles.chevron} />
          </Pressable>
        )}
        <View style={styles.row}>
          {model && drafts.takesShape(model) && (
            <View accessibilityLabel='Shape' role='group' style={styles.row}>
              {(Object.keys(drafts.SHAPES) as drafts.Shape[]).map((shape) => (
                <Button
                  key={shape}
                  kind='choice'
                  icon={<Outline shape={shape} isChosen={shape === draft.shape} />}
                  isChosen={shape === draft.shape}
                  title={shape}
                  onPress={() => change({ shape })}
                />
              ))}
            </View>
          )}
          {!draft.start &&
            models.some((each) => drafts.takesPicture(each) && drafts.canUse(each, entitlement)) &&
            (
              <Button
                kind='choice'
                title='From a picture'
                style={styles.grow}
                onPress={() => void pick()}
              />
            )}
        </View>
        {problem !== '' && <Text accessibilityRole='alert' style={styles.why}>{problem}</Text>}
      </ScrollView>
      <View style={styles.foot}>
        {why && <Text accessibilityRole='alert' style={styles.why}>{why}</Text>}
        <Button
          kind='main'
          title={model ? `Generate · ${price(model, entitlement)}` : 'Generate'}
          isDisabled={!isReady}
          onPress={() => isReady && generate(model, draft)}
        />
      </View>
      {isChoosing && (
        <ModelSheet
          models={offered}
          chosen={model}
          entitlement={entitlement}
          onChoose={(chosen) => {
            chooseModel(chosen);
            setIsChoosing(false);
          }}
          onClose={() => setIsChoosing(false)}
        />
      )}
    </>
  );
}

function StartPicture(
  { start, isOnline, onRemove }: { start: drafts.Start; isOnline: boolean; onRemove: () => void },
) {
  const [bucket, path] = 'path' in start ? start.path.split(/\/(.*)/) : [];
  const stored = usePicture(supabase, bucket === 'generations' && path ? path : null, isOnline);
  return (
    <View style={styles.start}>
      <Image
        accessibilityLabel='The picture to start from'
        contentFit='cover'
        source={'uri' in start ? { uri: start.uri } : stored}
        style={styles.thumb}
      />
      <Text style={styles.startText}>Starts from this picture</Text>
      <Button title='Remove' onPress={onRemove} />
    </View>
  );
}

function Outline({ shape, isChosen }: { shape: drafts.Shape; isChosen: boolean }) {
  const { width, height } = drafts.SHAPES[shape];
  const borderColor = isChosen ? color.onLight : color.glow;
  return <View style={[styles.outline, { borderColor, height: height / 64, width: width / 64 }]} />;
}

const styles = StyleSheet.create({
  scroll: { flexGrow: 0, flexShrink: 1 },
  fields: { gap: space.m, paddingHorizontal: space.l, paddingVertical: 3 }, // a focus ring's
  prompt: { ...field, textAlignVertical: 'top' },
  model: {
    alignItems: 'center',
    borderColor: color.line,
    borderRadius: 10,
    borderWidth: 1,
    flexDirection: 'row',
    gap: space.m,
    minHeight: 52,
    paddingHorizontal: space.m,
  },
  pressed: { opacity: 0.5 },
  title: { flex: 1, gap: 1 },
  label: { color: color.quiet, fontSize: 12 },
  name: { color: color.text, fontSize: 15 },
  chevron: {
    borderBottomWidth: 1.5,
    borderColor: color.quiet,
    borderRightWidth: 1.5,
    height: 8,
    marginTop: -4,
    transform: [{ rotate: '45deg' }],
    width: 8,
  },
  row: { flexDirection: 'row', flexWrap: 'wrap', gap: space.s },
  grow: { flexGrow: 1 },
  outline: { borderRadius: 3, borderWidth: 1.5 },
  start: { alignItems: 'center', flexDirection: 'row', gap: space.m },
  thumb: { backgroundColor: color.edge, borderRadius: 8, height: 48, width: 48 },
  startText: { color: color.text, flex: 1, fontSize: 14 },
  foot: { gap: space.s, paddingHorizontal: space.l, paddingTop: space.m - 3 },
  why: { color: color.glow, fontSize: 14, textAlign: 'center' },
});
