// graphile-worker. Options: jobs at once, and whether to batch as its performance page advises.
import { Logger, makeWorkerUtils, run, runMigrations } from 'graphile-worker';
import { main, showStatement, Work } from './protocol.mjs';

const TASK = 'bench';
const LOCAL_QUEUE = 500; // jobs
const logger = new Logger(() => () => {});

const preset = (url, { concurrency, isBatching }) => ({
  worker: {
    connectionString: url,
    concurrentJobs: concurrency,
    maxPoolSize: concurrency + 1,
    logger,
    ...(isBatching && {
      localQueue: { size: LOCAL_QUEUE },
      completeJobBatchDelay: 0,
      failJobBatchDelay: 0,
    }),
  },
});

await main({
  install: (url) => runMigrations({ connectionString: url, logger }),

  async statement(url, { payload }) {
    const utils = await makeWorkerUtils({ connectionString: url, logger });
    await showStatement(payload, () => utils.addJob(TASK, payload));
  },

  async work(url, options) {
    const work = new Work(options);
    await work.begin();
    const taskList = { [TASK]: ({ key }) => work.handled(key) };
    const runner = await run({ preset: preset(url, options), taskList, noHandleSignals: true });
    await runner.promise;
  },
});
