/** The one screen: ask on one side, what was asked on the other. */
import { useMemo, useRef } from 'react';
import {
  KeyboardAvoidingView,
  StyleSheet,
  Text,
  type TextInput,
  useWindowDimensions,
  View,
} from 'react-native';

import { type Generation, GenerationStore, listen, type Model, useGenerations } from '../darkroom';
import { type Draft, draftOf, request, useDraft } from '../draft';
import { environment } from '../environment';
import { api, supabase } from '../supabase';
import { signOut, type User } from '../useUser';
import { Button } from './Button';
import { Composer } from './Composer';
import { Empty } from './Empty';
import { Gallery } from './Gallery';
import { color, SIDE_WIDTH, space, TARGET, WIDE } from './theme';
import { credits, warning } from './words';

export function Studio({ user }: { user: User }) {
  const store = useMemo(
    () => new GenerationStore(api, environment, user.id, (hint) => listen(supabase, user.id, hint)),
    [user.id],
  );
  const darkroom = useGenerations(store);
  const { draft, change, chooseModel } = useDraft(environment.storage, user.id);
  const prompt = useRef<TextInput>(null);
  const { width } = useWindowDimensions();

  const isWide = width >= WIDE;

  /** Puts what asked for this into the composer; `source` is one of its pictures, to start from. */
  function startFrom(generation: Generation, source?: { path: string }) {
    change(draftOf(generation, darkroom.models, source));
    prompt.current?.focus();
  }
  function generate(model: Model, asked: Draft) {
    const { params, source } = request(asked, model);
    darkroom.generate(model, asked.prompt.trim(), params, source);
  }

  const warns = warning(darkroom.entitlement);
  const title = <Text aria-level={1} role='heading' style={styles.name}>Darkroom</Text>;
  const balance = (
    <View style={styles.balance}>
      {darkroom.credits !== null && (
        <Text testID='credits' style={styles.credits}>
          {credits(darkroom.credits)}
        </Text>
      )}
      {warns && <Text testID='warning' style={styles.warning}>{warns}</Text>}
    </View>
  );
  const leave = <Button title='Sign out' onPress={() => void signOut()} />;
  // Beside the list, or under it; its key keeps what is open in it when the device is turned.
  const composer = (
    <View
      key='composer'
      accessibilityLabel='New picture'
      role='region'
      style={isWide ? styles.side : styles.dock}
    >
      {isWide && <View style={styles.bar}>{title}{balance}</View>}
      <View key='fields' style={isWide ? styles.fill : styles.shrink}>
        <Composer
          darkroom={darkroom}
          draft={draft}
          change={change}
          chooseModel={chooseModel}
          generate={generate}
          promptRef={prompt}
          promptHeight={isWide ? 110 : 66}
        />
      </View>
      {isWide && (
        <View style={styles.bar}>
          <Text numberOfLines={1} style={styles.email}>{user.email}</Text>
          {leave}
        </View>
      )}
    </View>
  );
  return (
    <KeyboardAvoidingView behavior='padding' style={styles.page}>
      {!darkroom.isOnline && (
        <Text accessibilityRole='alert' testID='offline' style={styles.offline}>
          Offline. What you ask for is sent later.
        </Text>
      )}
      <View style={isWide ? styles.columns : styles.fill}>
        {isWide
          ? composer
          : <View key='bar' role='banner' style={styles.bar}>{title}{balance}{leave}</View>}
        <View key='list' role='main' style={styles.fill}>
          <Gallery
            darkroom={darkroom}
            empty={darkroom.entitlement && ( // else it is not known what there is
              <Empty
                onPick={(picked) => {
                  change({ prompt: picked });
                  prompt.current?.focus();
                }}
              />
            )}
            onStart={startFrom}
          />
        </View>
        {!isWide && composer}
      </View>
    </KeyboardAvoidingView>
  );
}

const styles = StyleSheet.create({
  page: { flex: 1 },
  columns: { flex: 1, flexDirection: 'row' },
  fill: { flex: 1 },
  shrink: { flexShrink: 1 },
  side: {
    borderRightColor: color.edge,
    borderRightWidth: 1,
    gap: space.s,
    paddingVertical: space.m,
    width: SIDE_WIDTH,
  },
  dock: {
    borderTopColor: color.edge,
    borderTopWidth: 1,
    maxHeight: '60%',
    paddingVertical: space.m,
  },
  bar: {
    alignItems: 'center',
    flexDirection: 'row',
    gap: space.m,
    justifyContent: 'space-between',
    minHeight: TARGET,
    paddingHorizontal: space.l,
  },
  name: { color: color.light, fontSize: 24, fontWeight: '700', letterSpacing: -0.5 },
  balance: { flex: 1 },
  credits: { color: color.text, fontSize: 15, fontVariant: ['tabular-nums'], textAlign: 'right' },
  warning: { color: color.quiet, fontSize: 13, textAlign: 'right' },
  email: { color: color.quiet, flexShrink: 1, fontSize: 14 },
  offline: {
    backgroundColor: color.edge,
    color: color.glow,
    fontSize: 14,
    padding: space.s,
    textAlign: 'center',
  },
});
