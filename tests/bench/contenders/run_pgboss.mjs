// pg-boss. Options: jobs per fetch, fetchers, whether jobs are notified.
import { PgBoss } from 'pg-boss';
import { main, showStatement, Work } from './protocol.mjs';

const QUEUE = 'bench';
const POLL_SECONDS = 0.5; // the least it allows

async function start(url, { notify = false } = {}) {
  const boss = new PgBoss({ connectionString: url, useListenNotify: notify });
  boss.on('error', (error) => console.error(error));
  await boss.start();
  return boss;
}

await main({
  async install(url, { notify = false }) {
    const boss = await start(url);
    await boss.createQueue(QUEUE, { notify });
    await boss.stop({ graceful: false });
  },

  async statement(url, options) {
    const boss = await start(url, options);
    await showStatement(options.payload, () => boss.send(QUEUE, options.payload));
  },

  async work(url, options) {
    const work = new Work(options);
    const boss = await start(url, options);
    await work.begin();
    const { batch: batchSize, concurrency: localConcurrency } = options;
    const polling = { pollingIntervalSeconds: POLL_SECONDS, burstWhenBatchFull: true };
    await boss.work(QUEUE, { batchSize, localConcurrency, ...polling }, async (jobs) => {
      for (const { data } of jobs) work.handled(data.key);
    });
    await new Promise(() => {});
  },
});
