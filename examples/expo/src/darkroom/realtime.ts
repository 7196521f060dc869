/**
 * Hints that something has changed, where Supabase Realtime is. They may be late, doubled or lost, so
 * they are nothing but a reason to read: whoever never gets one just reads a little later.
 */
import type { RealtimeChannel } from '@supabase/supabase-js';

import type { Client } from './api';

/**
 * Calls `hint` when a job has changed, and when listening has begun: what happened before was missed.
 * Tries broadcasts, then postgres_changes, then gives up. Answers how to stop.
 */
export function listen(supabase: Client, userId: string, hint: (jobId?: string) => void) {
  const row = { schema: 'public', table: 'generations', filter: `user_id=eq.${userId}` };
  const channels = [
    () =>
      supabase
        .channel(`user:${userId}`, { config: { private: true } })
        .on('broadcast', { event: 'generation' }, ({ payload }) => hint(payload.job_id)),
    () =>
      supabase
        .channel(`generations:${userId}`)
        .on<{ id: string }>('postgres_changes', { event: 'UPDATE', ...row }, (row) => hint(row.new.id)),
  ];
  let channel: RealtimeChannel | undefined;
  let isLive = false; // one that was live comes back by itself, and says so

  function tryNext(): void {
    const tried = channels.shift()?.();
    channel = tried;
    tried?.subscribe((state) => {
      if (state === 'SUBSCRIBED') {
        isLive = true;
        hint();
      } else if (!isLive && tried === channel && state !== 'CLOSED') {
        tryNext();
        void supabase.removeChannel(tried);
      }
    });
  }

  void supabase.realtime.setAuth().then(tryNext, () => undefined);
  return () => {
    channels.length = 0;
    if (channel) void supabase.removeChannel(channel);
  };
}
