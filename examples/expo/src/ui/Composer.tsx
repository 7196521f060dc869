/** What to ask for: prompt, model with its price, size, and a picture to start from. */
import { launchImageLibraryAsync } from 'expo-image-picker';
import { useState } from 'react';
import { StyleSheet, Text, TextInput, View } from 'react-native';

import { type Entitlement, type Model, type Params, priceOf, type Source } from '../darkroom';
import { Button } from './Button';
import { color, field, space } from './theme';
import { credits } from './words';

interface Size extends Params {
  width: number;
  height: number;
}

// Any model takes width and height: what it does not know is mapped to the nearest it does.
const SIZES: [string, Size][] = [
  ['Square', { width: 1024, height: 1024 }],
  ['Portrait', { width: 832, height: 1216 }],
  ['Landscape', { width: 1216, height: 832 }],
];
const SOURCE_TYPES = ['image/jpeg', 'image/png', 'image/webp'];

interface Props {
  models: readonly Model[];
  entitlement: Entitlement | null;
  generate: (model: Model, prompt: string, params: Params, source: Source | null) => void;
}

export function Composer({ models, entitlement, generate }: Props) {
  const [prompt, setPrompt] = useState('');
  const [modelId, setModelId] = useState('');
  const [sizeName, setSizeName] = useState('Square');
  const [picked, setPicked] = useState<{ uri: string; contentType: string } | null>(null);
  const [problem, setProblem] = useState('');

  const model = models.find(({ id }) => id === modelId) ?? models[0];
  const isPaid = entitlement?.plan === 'paid';
  const price = (of: Model) => priceOf(of, entitlement);
  const input = model?.image_inputs[0];
  const isReady = !!model && prompt.trim() !== '';

  async function pick() {
    const { assets } = await launchImageLibraryAsync({ mediaTypes: ['images'], quality: 0.9 });
    const asset = assets?.[0];
    if (!asset) return;
    const contentType = asset.mimeType ?? 'image/jpeg';
    const isTaken = SOURCE_TYPES.includes(contentType);
    setProblem(isTaken ? '' : 'Only JPEG, PNG and WebP pictures can be used.');
    setPicked(isTaken ? { uri: asset.uri, contentType } : null);
  }

  function press() {
    if (!isReady) return;
    const params = SIZES.find(([name]) => name === sizeName)![1];
    const isList = (model.inputs[input ?? ''] as { type?: string } | undefined)?.type === 'array';
    generate(model, prompt.trim(), params, picked && input ? { ...picked, input, isList } : null);
  }

  return (
    <View style={styles.form}>
      <TextInput
        accessibilityLabel='Prompt'
        multiline
        onChangeText={setPrompt}
        placeholder='A lighthouse at dusk, oil painting'
        placeholderTextColor={color.quiet}
        style={styles.prompt}
        value={prompt}
      />
      <View style={styles.choices}>
        {models.map((each) => (
          <Button
            key={each.id}
            kind='choice'
            isChosen={each === model}
            isDisabled={each.paused_until !== null || (each.requires_paid && !isPaid)}
            title={`${each.title}, ${price(each) ? credits(price(each)) : 'included'}`}
            onPress={() => setModelId(each.id)}
          />
        ))}
      </View>
      <View style={styles.choices}>
        {SIZES.map(([name]) => (
          <Button
            key={name}
            kind='choice'
            isChosen={name === sizeName}
            title={name}
            onPress={() => setSizeName(name)}
          />
        ))}
      </View>
      {input && (
        <Button
          title={picked ? 'Starts from your picture. Take it out' : 'Start from a picture'}
          onPress={() => (picked ? setPicked(null) : void pick())}
        />
      )}
      {problem !== '' && <Text style={styles.problem}>{problem}</Text>}
      <Button kind='main' title='Generate' isDisabled={!isReady} onPress={press} />
    </View>
  );
}

const styles = StyleSheet.create({
  form: { gap: space.m },
  prompt: { ...field, height: 110, textAlignVertical: 'top' },
  choices: { flexDirection: 'row', flexWrap: 'wrap', gap: space.s },
  problem: { color: color.glow, fontSize: 14 },
});
