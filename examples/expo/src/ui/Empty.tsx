/** What is seen before the first picture: something to begin with. */
import { StyleSheet, Text, View } from 'react-native';

import { Button } from './Button';
import { color, space } from './theme';

const PROMPTS = [
  'A lighthouse at dusk, oil painting',
  'A fox asleep in fresh snow, film photograph',
  'A tiny city inside a glass bottle, macro',
];

export function Empty({ onPick }: { onPick: (prompt: string) => void }) {
  return (
    <View style={styles.page}>
      <Text aria-level={2} role='heading' style={styles.title}>No pictures yet</Text>
      <Text style={styles.text}>Describe one, or begin with one of these.</Text>
      {PROMPTS.map((prompt) => (
        <Button
          key={prompt}
          kind='choice'
          title={prompt}
          onPress={() => onPick(prompt)}
        />
      ))}
    </View>
  );
}

const styles = StyleSheet.create({
  page: {
    alignSelf: 'center',
    gap: space.m,
    maxWidth: 400,
    paddingVertical: 80,
    width: '100%',
  },
  title: { color: color.text, fontSize: 22, fontWeight: '600', textAlign: 'center' },
  text: { color: color.quiet, fontSize: 16, marginBottom: space.m, textAlign: 'center' },
});
