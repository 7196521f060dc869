/** The one screen: ask on one side, what was asked on the other. */
import { useMemo, useState } from 'react';
import { FlatList, StyleSheet, Text, useWindowDimensions, View } from 'react-native';

import { type Generation, GenerationStore, listen, useGenerations } from '../darkroom';
import { environment } from '../environment';
import { api, supabase } from '../supabase';
import { signOut, type User } from '../useUser';
import { Button } from './Button';
import { Card } from './Card';
import { Composer } from './Composer';
import { color, space } from './theme';
import { Viewer } from './Viewer';
import { credits, warning } from './words';

const SIDE_WIDTH = 340;
const TILE_WIDTH = 210;

export function Studio({ user }: { user: User }) {
  const store = useMemo(
    () => new GenerationStore(api, environment, user.id, (hint) => listen(supabase, user.id, hint)),
    [user.id],
  );
  const darkroom = useGenerations(store);
  const [shownKey, setShownKey] = useState<string | null>(null);
  const { width } = useWindowDimensions();

  const isWide = width >= 860;
  const listWidth = (isWide ? width - SIDE_WIDTH : width) - 2 * space.l;
  const columns = Math.max(2, Math.floor((listWidth + space.m) / (TILE_WIDTH + space.m)));
  const tileWidth = Math.floor((listWidth - (columns - 1) * space.m) / columns);
  const retried = new Set(darkroom.generations.map(({ job }) => job.retry_of));
  const shown = darkroom.generations.find(({ key }) => key === shownKey);

  const warns = warning(darkroom.entitlement);
  const head = (
    <View style={isWide ? styles.side : styles.top}>
      <View style={styles.bar}>
        <Text style={styles.name}>Darkroom</Text>
        {darkroom.credits !== null && (
          <Text testID='credits' style={styles.credits}>
            {credits(darkroom.credits)}
          </Text>
        )}
      </View>
      {warns && <Text testID='warning' style={styles.email}>{warns}</Text>}
      <Composer
        models={darkroom.models}
        entitlement={darkroom.entitlement}
        generate={darkroom.generate}
      />
      <View style={styles.bar}>
        <Text numberOfLines={1} style={styles.email}>
          {user.email}
        </Text>
        <Button title='Sign out' onPress={() => void signOut()} />
      </View>
    </View>
  );
  const card = ({ item }: { item: Generation }) => (
    <Card
      generation={item}
      width={tileWidth}
      isOnline={darkroom.isOnline}
      hasRetry={retried.has(item.job.job_id)}
      onOpen={() => setShownKey(item.key)}
      onCancel={() => darkroom.cancel(item.key)}
      onRetry={() => darkroom.retry(item.key)}
    />
  );
  return (
    <View style={styles.page}>
      {!darkroom.isOnline && (
        <Text accessibilityRole='alert' testID='offline' style={styles.offline}>
          No connection. What you ask for is kept and sent later.
        </Text>
      )}
      <View style={styles.body}>
        {isWide && head}
        <FlatList
          key={columns}
          data={darkroom.generations}
          keyExtractor={({ key }) => key}
          renderItem={card}
          numColumns={columns}
          columnWrapperStyle={styles.row}
          contentContainerStyle={styles.list}
          ListHeaderComponent={isWide ? null : head}
          ListEmptyComponent={
            <Text style={styles.empty}>Nothing here yet. Ask for a picture.</Text>
          }
          onEndReached={() => void darkroom.loadMore()}
          onEndReachedThreshold={1}
          // onEndReached comes once, and not at all where the list was scrolled to its end before it
          // had measured its cells. This also asks again for a page that did not arrive.
          onScroll={({ nativeEvent: { contentOffset, contentSize, layoutMeasurement } }) => {
            const left = contentSize.height - contentOffset.y;
            if (left < 2 * layoutMeasurement.height) void darkroom.loadMore();
          }}
          scrollEventThrottle={100}
          style={styles.fill}
        />
      </View>
      {shown && (
        <Viewer
          job={shown.job}
          isOnline={darkroom.isOnline}
          onClose={() => setShownKey(null)}
        />
      )}
    </View>
  );
}

const styles = StyleSheet.create({
  page: { flex: 1 },
  body: { flex: 1, flexDirection: 'row' },
  fill: { flex: 1 },
  side: {
    borderRightColor: color.edge,
    borderRightWidth: 1,
    gap: space.l,
    padding: space.l,
    width: SIDE_WIDTH,
  },
  top: { gap: space.l, paddingBottom: space.l },
  bar: {
    alignItems: 'baseline',
    flexDirection: 'row',
    gap: space.m,
    justifyContent: 'space-between',
  },
  name: { color: color.light, fontSize: 24, fontWeight: '700', letterSpacing: -0.5 },
  credits: { color: color.text, fontSize: 15, fontVariant: ['tabular-nums'] },
  email: { color: color.quiet, flexShrink: 1, fontSize: 14 },
  list: { gap: space.m, padding: space.l },
  row: { gap: space.m },
  empty: { color: color.quiet, fontSize: 16, paddingVertical: 40, textAlign: 'center' },
  offline: {
    backgroundColor: color.edge,
    color: color.glow,
    fontSize: 14,
    padding: space.s,
    textAlign: 'center',
  },
});
