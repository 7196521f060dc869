// How the bench talks to a contender's program, in JavaScript: see protocol.py.
import readline from 'node:readline';
import pg from 'pg';
import { prepareValue } from 'pg/lib/utils.js';

const now = () => Number(process.hrtime.bigint()) / 1e9;

/** One run of `work`. */
export class Work {
  constructor({ jobs, seconds, keys }) {
    Object.assign(this, { jobs, seconds, wantsKeys: keys, moments: [], keys: [], isOver: false });
  }

  /** Says that all is prepared, and waits for the start. */
  async begin() {
    const lines = readline.createInterface({ input: process.stdin })[Symbol.asyncIterator]();
    console.log('ready');
    await lines.next();
    this.began = now();
    setTimeout(() => this.finish(), this.seconds * 1000);
    lines.next().then(() => this.finish());
  }

  /** Notes that a job was handled now. */
  handled(key) {
    this.moments.push(now());
    if (this.wantsKeys) this.keys.push(key);
    if (this.moments.length === this.jobs) this.finish();
  }

  /** Reports, then ends. */
  finish() {
    if (this.isOver) return;
    this.isOver = true;
    const { began, moments, keys } = this;
    const megabytes = process.memoryUsage().rss / 2 ** 20;
    const report = JSON.stringify({ began, moments, keys, claims: [], megabytes });
    process.stdout.write(`${report}\n`, () => process.exit(0));
  }
}

/** Prints the statement among those sent meanwhile that carries the payload. */
export async function showStatement(payload, enqueue) {
  const query = pg.Client.prototype.query;
  let found;
  pg.Client.prototype.query = function (text, values, ...rest) {
    if (Array.isArray(values) && values.some((value) => String(value).includes(payload.key))) {
      found = { text, values: values.map(prepareValue) };
    }
    return query.call(this, text, values, ...rest);
  };
  await enqueue();
  console.log(JSON.stringify(found));
}

/** Runs the command that the command line names. */
export async function main(commands) {
  const [command, url, options] = process.argv.slice(2);
  await commands[command](url, JSON.parse(options));
  process.exit(0);
}
