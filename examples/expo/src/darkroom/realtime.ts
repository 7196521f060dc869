/**
 * Hints that something has changed, where Supabase Realtime is. They may be late, doubled or lost,
 * so they are nothing but a reason to read: whoever never gets one just reads a little later.
 */
import type { RealtimeChannel } from '@supabase/supabase-js';

import type { Client } from './api';

/**
 * Calls `hint` when a job has changed, and when listening has begun, for what happened before was
 * missed. Tries broadcasts, then postgres_changes, then gives up. Answers how to stop.
 */
export function listen(supabase: Client, userId: string, hint: () => void): () => void {
  const config = { private: true };
  const event = { event: 'generation' };
  const filter = `user_id=eq.${userId}`;
  const rows = { event: 'UPDATE', schema: 'public', table: 'generations', filter } as const;
  const ways = [
    () => supabase.channel(`user:${userId}`, { config }).on('broadcast', event, () => hint()),
    () => supabase.channel(`generations:${userId}`).on('postgres_changes', rows, () => hint()),
  ];
  let channel: RealtimeChannel | undefined;
  let isLive = false; // one that was live comes back by itself, and says so

  function tryNext(): void {
    const tried = (channel = ways.shift()?.());
    tried?.subscribe((state) => {
      if (state === 'SUBSCRIBED') {
        isLive = true;
        hint();
      } else if (!isLive && tried === channel) {
        tryNext();
        void supabase.removeChannel(tried);
      }
    });
  }

  void supabase.realtime.setAuth().then(tryNext, () => undefined);
  return () => {
    ways.length = 0;
    if (channel) void supabase.removeChannel(channel);
  };
}
