/** The rules of the store, one by one. That they hold in every order of events: orders.test.ts. */
import { DarkroomError } from '../src/darkroom';
import { reason, warning } from '../src/ui/words';
import { DEAR_MODEL, FakePhone, FakeServer, MODEL, PAID_MODEL, USER_ID } from './fakeServer';

let server: FakeServer;
let phone: FakePhone;

const after = (ms: number) => jest.advanceTimersByTimeAsync(ms);
const shown = () => phone.store.getSnapshot();
const top = () => shown().generations[0]!;
const prompts = () => shown().generations.map(({ job }) => job.prompt);
const press = (prompt = 'a lighthouse') => phone.store.generate(MODEL, prompt, {});
const name = (rest: string) => `darkroom.${USER_ID}.${rest}`;
const outbox = () => [...phone.stored.keys()].filter((key) => key.startsWith(name('outbox.')));

/** The app is open, and has read what there was. */
async function open(): Promise<void> {
  phone.open();
  await after(10);
  phone.forgetRequests();
}

/** An app that was open before and is opened again without a network. */
async function reopenOffline(): Promise<void> {
  phone.kill();
  phone.goOff();
  phone.open();
  await after(10);
}

beforeEach(() => {
  jest.useFakeTimers();
  server = new FakeServer();
  phone = new FakePhone(server);
});

afterEach(() => phone.store.stop());

describe('a press', () => {
  test('puts a placeholder on the list before anything else happens', async () => {
    phone.storageLatency = 500;
    await open();

    const key = press();

    expect(top()).toMatchObject({ key, local: 'sending', job: { job_id: '', status: 'queued' } });
    expect(phone.stored.size).toBe(0);
    expect(phone.count()).toBe(0);
  });

  test('tells subscribers at once', async () => {
    await open();
    const tell = jest.fn();
    phone.store.subscribe(tell);

    press();

    expect(tell).toHaveBeenCalled();
  });

  test('is on the device before it is sent', async () => {
    await open();
    phone.storageLatency = 500;
    press();

    await after(499);
    expect(phone.count('enqueue')).toBe(0);
    await after(2);

    expect(phone.count('enqueue')).toBe(1);
    expect(phone.heldAtRequest.enqueue).toEqual([name(`outbox.${top().key}`)]);
  });

  test('is on the device before it is sent, also while another is being sent', async () => {
    await open();
    phone.latency = 100;
    press('one');
    await after(50);
    phone.storageLatency = 1_000;

    press('two');
    await after(500);

    expect(phone.count('enqueue')).toBe(1);
  });

  test('is sent though the device keeps nothing', async () => {
    phone.isStorageBroken = true;
    await open();

    press();
    await after(10);

    expect(top()).toMatchObject({ local: null, job: { job_id: server.newest().job_id } });
  });

  test('leaves the device when it is answered', async () => {
    await open();

    press();
    await after(10);

    expect(outbox()).toEqual([]);
  });

  test('becomes the job in its place, under its key', async () => {
    server.addHistory(2);
    await open();

    const key = press();
    await after(10);

    expect(prompts()).toEqual(['a lighthouse', 'older 1', 'older 0']);
    expect(top()).toMatchObject({ key, local: null, job: { job_id: server.newest().job_id } });
  });

  test('answered with an older job leaves one card', async () => {
    server.addHistory(1);
    await open();

    phone.store.generate(MODEL, 'older 0', { seed: 7, reuse: true });
    await after(10);

    expect(prompts()).toEqual(['older 0']);
    expect(outbox()).toEqual([]);
  });

  test('answered with an older job that was not on the list shows its pictures', async () => {
    server.addHistory(30);
    await open();

    const key = phone.store.generate(MODEL, 'older 0', { seed: 7, reuse: true });
    await after(10);

    const card = shown().generations.find((g) => g.key === key);
    expect(card!.job).toMatchObject({ status: 'completed', images: [{ position: 0 }] });
  });

  test('is remembered with the key of its card on every device', async () => {
    await open();
    const key = press();
    await after(10);

    phone.kill();
    phone.stored.clear();
    await open();

    expect(top().key).toBe(key);
  });
});

describe('a double press', () => {
  test('twenty times with every answer lost is one job and one charge', async () => {
    await open();
    phone.network = 'lossy';

    for (let i = 0; i < 20; i += 1) {
      press();
      await after(777);
    }
    phone.goOn();
    await after(40_000);

    expect(server.jobs).toHaveLength(1);
    expect(server.charges()).toBe(1);
    expect(shown().generations).toHaveLength(1);
  });

  test('within a second is one job, even if it was answered in between', async () => {
    await open();

    press();
    await after(900);
    press();
    await after(10);

    expect(server.jobs).toHaveLength(1);
  });

  test('a second after the answer is a new job', async () => {
    await open();

    press();
    await after(1_000);
    press();
    await after(10);

    expect(server.jobs).toHaveLength(2);
  });

  test('of another prompt, model, size or picture is none', async () => {
    await open();
    const source = {
      uri: 'file:///cat.jpg',
      contentType: 'image/jpeg',
      input: 'image',
      isList: false,
    };

    const keys = [
      press(),
      press('a cat'),
      phone.store.generate(PAID_MODEL, 'a cat', {}),
      phone.store.generate(PAID_MODEL, 'a cat', { width: 768 }),
      phone.store.generate(PAID_MODEL, 'a cat', { width: 768 }, source),
    ];

    expect(new Set(keys).size).toBe(5);
  });

  test('after a cancellation is a new wish', async () => {
    await open();
    phone.hold('enqueue');
    const key = press();

    void phone.store.cancel(key);

    expect(press()).not.toBe(key);
  });
});

describe('shown credits', () => {
  test('drop at once', async () => {
    await open();

    press();

    expect(shown().credits).toBe(9);
    expect(server.balance).toBe(10);
  });

  test('are never below zero', async () => {
    await open();

    phone.store.generate(DEAR_MODEL, 'a lighthouse', {});

    expect(shown().credits).toBe(0);
  });

  test('go by the price of the plan', async () => {
    server.plan = 'paid';
    await open();

    phone.store.generate(DEAR_MODEL, 'a lighthouse', {});

    expect(shown().credits).toBe(8);
    expect(top().job.price_credits).toBe(2);
  });

  test('are corrected by the answer', async () => {
    await open();
    server.balance = 5;

    press();
    await after(10);

    expect(shown().credits).toBe(4);
    expect(phone.count('entitlement')).toBe(0);
  });

  test('are read anew when a job gave some back', async () => {
    await open();
    press();
    await after(10);

    server.fail();
    await after(1_010);

    expect(shown().credits).toBe(10);
    expect(phone.count('entitlement')).toBe(1);
  });

  test('are read anew when an answer was lost', async () => {
    await open();
    phone.hold('enqueue');
    press();
    await after(1);

    phone.hint();
    await after(10);

    expect(top().local).toBeNull();
    expect(shown().credits).toBe(9);
  });

  test('are read anew when they were read while a charge was on its way', async () => {
    phone.hold('entitlement');
    phone.open();
    await after(10);
    press();
    await after(10);

    phone.release('entitlement');
    await after(1_010);

    expect(shown().credits).toBe(9);
  });

  test('are not what an overtaken answer says', async () => {
    await open();
    phone.hold('enqueue');
    press();
    await after(1);
    server.fail();
    phone.hide();
    phone.show();
    await after(10);

    phone.release('enqueue');
    await after(1_010);

    expect(shown().credits).toBe(10);
  });

  test('are read anew when the app is shown', async () => {
    await open();
    server.balance = 50;

    phone.hide();
    phone.show();
    await after(10);

    expect(shown().credits).toBe(50);
  });

  test('that end are told, and read anew when some were spent', async () => {
    server.ending = [
      { credits: 1, expires_at: '2099-05-03T12:00:00+00:00' },
      { credits: 9, expires_at: '2099-06-03T12:00:00+00:00' },
    ];
    await open();
    expect(warning(shown().entitlement)).toBe('1 credit ends on 3 May');

    server.ending = server.ending.slice(1);
    press();
    await after(1_010);

    expect(warning(shown().entitlement)).toBe('9 credits end on 3 June');
    expect(warning({ ...shown().entitlement!, debt: 12 })).toMatch(/^12 credits owed/);
    expect(warning({ ...server.entitlement(), credits_ending: [] })).toBeNull();
  });

  test('are unknown before they were read', () => {
    phone.goOff();
    phone.open();

    expect(shown()).toMatchObject({ credits: null, entitlement: null });
  });
});

describe('a refusal', () => {
  const refusals: [number, string, () => string][] = [
    [402, 'insufficient_credits', () => phone.store.generate(DEAR_MODEL, 'a lighthouse', {})],
    [403, 'requires_paid_plan', () => phone.store.generate(PAID_MODEL, 'a lighthouse', {})],
    [429, 'too_many_active', () => ((server.maxActive = 0), press())],
    [404, 'not_found', () => phone.store.generate({ ...MODEL, id: 'gone' }, 'a lighthouse', {})],
  ];

  test.each(refusals)('(%i %s) keeps the prompt and tells why', async (_, token, ask) => {
    await open();

    const key = ask();
    await after(60_000);

    const job = { prompt: 'a lighthouse', error: { code: token } };
    expect(top()).toMatchObject({ key, local: 'refused', job });
    expect(phone.count('enqueue')).toBe(1);
    expect(shown()).toMatchObject({ credits: 10, isOnline: true });
  });

  test('tells what the server said', async () => {
    await open();

    phone.store.generate(DEAR_MODEL, 'a lighthouse', {});
    await after(10);

    expect(top().job.error!.message).toBe('need 100, have 10');
  });

  test('of a price tells the new one, which is agreed to by sending it again', async () => {
    await open();
    server.models = [{ ...MODEL, price_credits: 3 }];
    const key = press();
    await after(10);

    expect(top()).toMatchObject({ key, local: 'refused', job: { price_credits: 3 } });
    expect(reason(top())).toBe('The price changed to 3 credits.');
    expect(shown()).toMatchObject({ credits: 10, models: [{ price_credits: 3 }] });
    phone.store.retry(key);
    await after(10);

    expect(top()).toMatchObject({ key, local: null });
    expect(shown().credits).toBe(7);
  });

  test('of a price is one also for what failed at the price of before', async () => {
    await open();
    const key = press();
    await after(10);
    server.fail();
    server.models = [{ ...MODEL, price_credits: 3 }];
    await after(1_010);

    phone.store.retry(key);
    await after(10);

    expect(top()).toMatchObject({ local: 'refused', job: { price_credits: 3 } });
    expect(server.jobs).toHaveLength(1);
  });

  test.each([
    ['in_debt', 'Credits that were taken back are still owed.'],
    ['account_blocked', 'This account cannot ask for pictures.'],
    ['budget_spent', 'No more of these can be made for now. Try another model, or later.'],
  ])('(%s) is told in words', async (token, words) => {
    await open();
    server.refusal = new DarkroomError(token, 402, 'Somewhat technical.');

    press();
    await after(10);

    expect(reason(top())).toBe(words);
  });

  test('is sent again under its key by retry', async () => {
    await open();
    const key = phone.store.generate(DEAR_MODEL, 'a lighthouse', {});
    await after(10);
    server.balance = 100;

    phone.store.retry(key);
    expect(top()).toMatchObject({ local: 'sending', job: { error: null } });
    await after(10);

    expect(top()).toMatchObject({ key, local: null, job: { idempotency_key: null } });
    expect(server.newest().idempotency_key).toBe(key);
    expect(shown().credits).toBe(0);
  });

  test('sent again twice is one job', async () => {
    await open();
    server.maxActive = 0;
    const key = press();
    await after(10);
    server.maxActive = 1;

    phone.store.retry(key);
    phone.store.retry(key);
    await after(10);

    expect(server.jobs).toHaveLength(1);
    expect(shown().generations).toHaveLength(1);
  });

  test('does not hold up what was pressed after it', async () => {
    await open();

    phone.store.generate(DEAR_MODEL, 'a palace', {});
    press();
    await after(10);

    expect(shown().generations.map((g) => [g.job.prompt, g.local])).toEqual([
      ['a lighthouse', null],
      ['a palace', 'refused'],
    ]);
  });

  test('is still there after a restart, and not sent by itself', async () => {
    await open();
    phone.store.generate(DEAR_MODEL, 'a palace', {});
    await after(10);

    phone.kill();
    await open();

    expect(top()).toMatchObject({ local: 'refused', job: { prompt: 'a palace' } });
    expect(phone.count('enqueue')).toBe(0);
  });

  test('is dismissed by cancel', async () => {
    await open();
    const key = phone.store.generate(DEAR_MODEL, 'a palace', {});
    await after(10);

    await phone.store.cancel(key);
    await after(10);

    expect(shown().generations).toEqual([]);
    expect(outbox()).toEqual([]);
    expect(phone.count('cancel')).toBe(0);
  });
});

describe('a lost answer', () => {
  test('is asked for again with the same key, at growing intervals up to 30 s', async () => {
    await open();
    phone.network = 'lossy';
    press();
    const times: number[] = [];

    for (let second = 0; second <= 95; second += 1) {
      await after(second ? 1_000 : 10);
      for (let i = times.length; i < phone.count('enqueue'); i += 1) times.push(second);
    }

    expect(times).toEqual([0, 1, 3, 7, 15, 31, 61, 91]);
    expect(server.jobs).toHaveLength(1);
  });

  test('shows the request as waiting, and the app as offline', async () => {
    await open();
    phone.network = 'lossy';

    press();
    await after(10);

    expect(shown()).toMatchObject({ isOnline: false, generations: [{ local: 'waiting' }] });
  });

  test('starts again with short intervals after one that came', async () => {
    await open();
    phone.network = 'lossy';
    press();
    await after(20_000);
    phone.goOn();
    await after(30_000);
    phone.network = 'lossy';
    phone.forgetRequests();

    press('a cat');
    await after(1_010);

    expect(phone.count('enqueue')).toBe(2);
  });

  test('for want of a session is asked for again', async () => {
    await open();
    server.refusal = new DarkroomError('not_authenticated', 401, '', true);
    press();
    await after(10);

    server.refusal = null;
    await after(1_010);

    expect(top()).toMatchObject({ local: null, job: { prompt: 'a lighthouse' } });
  });
});

describe('without a network', () => {
  test('requests wait on the device and are sent in the order of the presses', async () => {
    await open();
    phone.goOff();
    for (const prompt of ['one', 'two', 'three', 'four', 'five']) {
      press(prompt);
      await after(100);
    }

    await reopenOffline();
    expect(prompts()).toEqual(['five', 'four', 'three', 'two', 'one']);
    phone.goOn();
    await after(40_000);

    expect(server.jobs.map(({ prompt }) => prompt)).toEqual([
      'one',
      'two',
      'three',
      'four',
      'five',
    ]);
    expect(prompts()).toEqual(['five', 'four', 'three', 'two', 'one']);
  });

  test('they are sent at once when the device says that it is back', async () => {
    await open();
    phone.goOff();
    press();
    await after(20_000);

    phone.goOn(true);
    await after(10);

    expect(server.jobs).toHaveLength(1);
    expect(shown().isOnline).toBe(true);
  });

  test('the list of the last time is shown', async () => {
    server.addHistory(3);
    await open();

    await reopenOffline();

    expect(prompts()).toEqual(['older 2', 'older 1', 'older 0']);
    expect(shown()).toMatchObject({ credits: 10, isOnline: false });
    expect(shown().models).toHaveLength(3);
  });

  test('what was just answered is shown after a restart', async () => {
    await open();
    const key = press();
    await after(10);

    await reopenOffline();

    expect(top()).toMatchObject({ key, local: null, job: { job_id: server.newest().job_id } });
  });

  test('of the history forty are kept', async () => {
    server.addHistory(60);
    await open();
    await phone.store.loadMore();
    await phone.store.loadMore();
    press();
    await after(10);

    await reopenOffline();

    expect(shown().generations).toHaveLength(40);
  });

  test('everything is read anew when it is back', async () => {
    await open();
    press();
    await after(10);
    phone.goOff();
    await after(2_000);
    server.addHistory(1);

    phone.goOn();
    await after(10_000);

    expect(prompts()).toEqual(['older 0', 'a lighthouse']);
  });
});

describe('reading', () => {
  test.each([
    ['known', 60],
    ['unknown', null],
  ])('a job of a minute takes at most twelve reads if that is %s before', async (_, mean) => {
    server.meanSeconds = mean;
    await open();
    press();
    await after(0);
    server.begin();

    await after(60_000);
    server.complete();
    await after(10_000);

    expect(top().job.status).toBe('completed');
    expect(phone.count()).toBe(phone.count('enqueue', 'activeJobs'));
    expect(phone.count('activeJobs')).toBeLessThanOrEqual(12);
    expect(jest.getTimerCount()).toBe(0);
  });

  test('of a hidden app does not happen', async () => {
    await open();
    press();
    await after(10);
    phone.forgetRequests();

    phone.hide();
    phone.hint();
    await phone.store.loadMore();
    await phone.store.cancel(top().key);
    await after(60_000);

    expect(phone.count()).toBe(0);
  });

  test('stops between two requests when the app is hidden', async () => {
    phone.latency = 100;
    phone.open();

    await after(150);
    phone.hide();
    await after(1_000);

    expect(phone.requestsWhileHidden).toBe(0);
    expect(phone.count('entitlement')).toBe(0);
  });

  test('cut off by the system does not count as offline', async () => {
    await open();
    phone.hold('activeJobs');
    phone.hint();
    await after(10);
    const online: boolean[] = [];
    phone.store.subscribe(() => online.push(shown().isOnline));

    phone.hide();
    phone.show();
    phone.goOff();
    phone.goOn();
    await after(10);

    expect(online).not.toContain(false);
  });

  test('starts over when the app is shown while an old answer is on its way', async () => {
    await open();
    phone.hold('page');
    phone.hide();
    phone.show();
    await after(10);
    server.addHistory(1);

    phone.hide();
    phone.show();
    phone.release('page');
    await after(10);

    expect(prompts()).toEqual(['older 0']);
  });

  test('is one call for all active jobs', async () => {
    await open();
    for (const prompt of ['one', 'two', 'three']) press(prompt);
    await after(10);
    phone.forgetRequests();

    await after(1_000);

    expect(phone.requests).toEqual({ activeJobs: 1 });
  });

  test('of many active jobs asks for the oldest hundred, which end first', async () => {
    server.balance = 200;
    server.maxActive = 200;
    await open();
    for (let i = 0; i < 150; i += 1) press(`picture ${i}`);
    await after(10);

    server.jobs.slice(0, 5).forEach((job) => server.complete(job));
    await after(2_000);

    const statuses = shown().generations.map(({ job }) => job.status);
    expect(statuses.filter((status) => status === 'completed')).toHaveLength(5);
    expect(shown().isOnline).toBe(true);
  });

  test('of one job is not put off by others that are pressed', async () => {
    await open();
    press('one');
    await after(600);

    press('two');
    await after(410);

    expect(phone.count('activeJobs')).toBe(1);
  });

  test('is no more often than once a second, whatever the server says', async () => {
    await open();
    press();
    await after(10);
    server.pollAfter = () => 0;
    phone.hint();
    phone.forgetRequests();

    await after(5_000);

    expect(phone.count('activeJobs')).toBeLessThanOrEqual(6);
  });

  test('happens when a hint comes, and only then', async () => {
    await open();
    press();
    await after(10);
    server.complete();

    phone.hint();
    await after(10);

    expect(top().job.status).toBe('completed');
    expect(phone.count('activeJobs')).toBe(1);
  });

  test('after a storm of hints is once more', async () => {
    await open();
    phone.latency = 50;

    for (let i = 0; i < 30; i += 1) phone.hint();
    await after(1_000);

    expect(phone.count('activeJobs')).toBe(2);
  });

  test('overtaken by a newer one does not bring a finished job back', async () => {
    await open();
    const key = press();
    await after(10);
    server.addHistory(30);
    phone.hide();
    phone.show();
    await after(10);
    const statuses = new Set<string>();
    const release = phone.holdNext('activeJobs');
    phone.hint();
    await after(10);
    server.complete(server.jobs[0]);

    await phone.store.loadMore();
    phone.store.subscribe(() => {
      statuses.add(shown().generations.find((g) => g.key === key)!.job.status);
    });
    release();
    await after(10);

    expect([...statuses]).toEqual(['completed']);
  });
});

describe('another device', () => {
  test('its new job appears in its place', async () => {
    server.addHistory(1);
    await open();
    press('mine');
    await after(10);
    phone.goOff();
    press('mine, unsent');
    await after(10);
    server.enqueue(MODEL.id, 'theirs', {}, 'their key');

    phone.goOn();
    phone.hint();
    phone.hold('enqueue');
    await after(3_000);

    expect(prompts()).toEqual(['mine, unsent', 'theirs', 'mine', 'older 0']);
    expect(shown().generations[1]!.key).toBe('their key');
  });

  test('its new job is above what was refused here before', async () => {
    server.addHistory(1);
    await open();
    phone.store.generate(DEAR_MODEL, 'refused', {});
    await after(10);
    press('mine');
    await after(10);

    server.enqueue(MODEL.id, 'theirs', {}, null);
    phone.hint();
    await after(10);

    expect(prompts()).toEqual(['theirs', 'mine', 'refused', 'older 0']);
  });

  test('its new job is charged here too', async () => {
    await open();
    server.enqueue(MODEL.id, 'theirs', {}, null);

    phone.hint();
    await after(10);

    expect(shown().credits).toBe(9);
  });

  test('what it deleted disappears, wherever it was on the page', async () => {
    server.addHistory(5);
    await open();
    [0, 2, 4].forEach((at) => server.delete(server.jobs[at]));

    phone.hide();
    phone.show();
    await after(10);

    expect(prompts()).toEqual(['older 3', 'older 1']);
  });

  test('all it deleted disappears', async () => {
    server.addHistory(3);
    await open();
    server.jobs.forEach((job) => server.delete(job));

    phone.hide();
    phone.show();
    await after(10);

    expect(shown().generations).toEqual([]);
  });

  test('an active job it ended and deleted disappears', async () => {
    await open();
    press();
    await after(10);
    server.complete();
    server.delete();

    await after(2_000);

    expect(shown().generations).toEqual([]);
    expect(jest.getTimerCount()).toBe(0);
  });
});

describe('the history', () => {
  const numbers = () => prompts().map((prompt) => Number(prompt.split(' ')[1]));
  const downFrom = (newest: number, count: number) =>
    Array.from({ length: count }, (_, i) => newest - i);

  test('comes page by page without doubles', async () => {
    server.addHistory(45);
    await open();

    expect(shown()).toMatchObject({ hasMore: true, generations: { length: 20 } });
    await phone.store.loadMore();
    await phone.store.loadMore();
    await phone.store.loadMore();

    expect(numbers()).toEqual(downFrom(44, 45));
    expect(shown().hasMore).toBe(false);
    expect(phone.count('page')).toBe(2);
  });

  test('asks for one page at a time', async () => {
    server.addHistory(45);
    await open();

    void phone.store.loadMore();
    void phone.store.loadMore();
    await after(10);

    expect(phone.count('page')).toBe(1);
  });

  test('goes on where it was if a page did not arrive', async () => {
    server.addHistory(25);
    await open();
    phone.goOff();
    await phone.store.loadMore();
    expect(shown().hasMore).toBe(true);

    phone.goOn();
    await phone.store.loadMore();

    expect(numbers()).toEqual(downFrom(24, 25));
  });

  test('keeps the pages that were read while new ones come', async () => {
    server.addHistory(45);
    await open();
    await phone.store.loadMore();
    server.addHistory(5);

    phone.hide();
    phone.show();
    await after(10);

    expect(shown().generations).toHaveLength(45);
    await phone.store.loadMore();
    expect(shown().generations).toHaveLength(50);
  });

  test('has no gap when more than a page is new', async () => {
    server.addHistory(45);
    await open();
    await phone.store.loadMore();
    server.addHistory(30);

    phone.hide();
    phone.show();
    await after(10);

    expect(shown().generations.map(({ job }) => job.job_id)).toEqual(
      server.page(null).generations.map(({ job_id }) => job_id),
    );
    for (let page = 0; page < 4; page += 1) await phone.store.loadMore();
    expect(shown().generations).toHaveLength(75);
  });

  test('has no gap though one of the new ones was known', async () => {
    server.addHistory(25);
    await open();
    server.addHistory(20);
    server.enqueue(MODEL.id, 'theirs', {}, null);
    phone.hint();
    await after(10);
    server.addHistory(10);

    phone.hide();
    phone.show();
    await after(10);
    for (let page = 0; page < 4; page += 1) await phone.store.loadMore();

    expect(shown().generations).toHaveLength(56);
  });

  test('keeps the card of an active job that is on no page read so far', async () => {
    await open();
    const key = press();
    await after(10);
    server.addHistory(30);

    phone.hide();
    phone.show();
    await after(10);
    expect(shown().generations.at(-1)!.key).toBe(key);
    server.complete(server.jobs[0]);
    await after(12_000);

    expect(shown().generations.at(-1)).toMatchObject({ key, job: { status: 'completed' } });
  });

  test('is not mixed up if it begins anew while a page is on its way', async () => {
    server.addHistory(45);
    await open();
    const release = phone.holdNext('page');
    const loaded = phone.store.loadMore();
    server.addHistory(30);
    phone.hide();
    phone.show();
    await after(10);

    release();
    await loaded;
    for (let page = 0; page < 4; page += 1) await phone.store.loadMore();

    expect(shown().generations).toHaveLength(75);
  });

  test('ends where the server says, also on an empty page', async () => {
    await open();

    await phone.store.loadMore();

    expect(shown().hasMore).toBe(false);
    expect(phone.count('page')).toBe(0);
  });
});

describe('cancel', () => {
  test('shows at once that it was asked for', async () => {
    await open();
    const key = press();
    await after(10);

    void phone.store.cancel(key);

    expect(top().job.cancel_requested).toBe(true);
  });

  test('of a queued job gives its credits back', async () => {
    await open();
    const key = press();
    await after(10);

    void phone.store.cancel(key);
    await after(10);

    expect(top()).toMatchObject({ key, local: null, job: { status: 'canceled' } });
    expect(shown().credits).toBe(10);
    expect(jest.getTimerCount()).toBe(0);
  });

  test('does not change the shown credits while it is on its way', async () => {
    await open();
    const key = press();
    await after(10);
    phone.hold('cancel');

    void phone.store.cancel(key);
    await after(10);

    expect(shown().credits).toBe(9);
  });

  test('of a running job waits for its worker', async () => {
    await open();
    const key = press();
    await after(10);
    server.begin();

    void phone.store.cancel(key);
    await after(10);
    expect(top().job).toMatchObject({ status: 'processing', cancel_requested: true });
    server.stopCanceled();
    await after(2_000);

    expect(top().job.status).toBe('canceled');
    expect(shown().credits).toBe(10);
  });

  test('that comes too late shows the picture', async () => {
    await open();
    const key = press();
    await after(10);
    server.complete();

    void phone.store.cancel(key);
    await after(10);

    expect(top()).toMatchObject({
      local: null,
      job: { status: 'completed', cancel_requested: false },
    });
    expect(outbox()).toEqual([]);
  });

  test('without an answer is repeated, also after a restart', async () => {
    await open();
    const key = press();
    await after(10);
    phone.goOff();
    void phone.store.cancel(key);
    await after(10);

    await reopenOffline();
    phone.goOn();
    await after(10_000);

    expect(server.newest().status).toBe('canceled');
    expect(top()).toMatchObject({ key, local: null, job: { status: 'canceled' } });
  });

  test('of an unsent request sends it first, for it may have been sent', async () => {
    await open();
    phone.network = 'lossy';
    const key = press();
    await after(10);

    void phone.store.cancel(key);
    phone.goOn();
    await after(10_000);

    expect(server.jobs.map(({ status }) => status)).toEqual(['canceled']);
    expect(top()).toMatchObject({ key, local: null, job: { status: 'canceled' } });
    expect(shown().credits).toBe(10);
  });

  test('is not forgotten if a read is faster than the answer', async () => {
    await open();
    phone.hold('enqueue');
    const key = press();
    await after(1);
    void phone.store.cancel(key);

    phone.hint();
    await after(10);
    phone.release('enqueue');
    await after(10);

    expect(server.newest().status).toBe('canceled');
  });

  test('of a request that is then refused keeps it, not canceled', async () => {
    await open();
    phone.hold('enqueue');
    const key = phone.store.generate(DEAR_MODEL, 'a palace', {});
    await after(1);

    void phone.store.cancel(key);
    phone.release('enqueue');
    await after(10);

    expect(top()).toMatchObject({ local: 'refused', job: { cancel_requested: false } });
  });

  test('of what is not on the list does nothing', async () => {
    await open();

    await phone.store.cancel('nothing');
    await after(10);

    expect(phone.count()).toBe(0);
  });
});

describe('retry', () => {
  /** The app is open and shows a job that failed. */
  async function openFailed(): Promise<string> {
    server.enqueue(MODEL.id, 'a lighthouse', { width: 768 }, null);
    server.fail();
    await open();
    return top().key;
  }

  test('of a failed job is a new card above it, charged anew', async () => {
    const key = await openFailed();

    phone.store.retry(key);
    expect(top()).toMatchObject({ local: 'sending', job: { prompt: 'a lighthouse' } });
    expect(shown().credits).toBe(9);
    await after(10);

    expect(shown().generations.map(({ job }) => job.status)).toEqual(['queued', 'failed']);
    expect(server.newest()).toMatchObject({ retry_of: server.jobs[0]!.job_id });
    expect(top().job.params).toEqual({ width: 768 });
  });

  test('of a canceled job works alike', async () => {
    server.enqueue(MODEL.id, 'a lighthouse', {}, null);
    server.stopCanceled();
    await open();

    phone.store.retry(top().key);
    await after(10);

    expect(server.jobs).toHaveLength(2);
  });

  test('pressed twice is one job', async () => {
    const key = await openFailed();

    phone.store.retry(key);
    phone.store.retry(key);
    expect(shown().generations).toHaveLength(2);
    await after(10);
    phone.store.retry(key);
    expect(shown().generations).toHaveLength(2);
    await after(10);

    expect(server.jobs).toHaveLength(2);
  });

  test('with its answer lost is one job and one card', async () => {
    const key = await openFailed();
    phone.network = 'lossy';

    phone.store.retry(key);
    const retryKey = top().key;
    await after(20_000);
    phone.goOn();
    await after(40_000);

    expect(server.jobs).toHaveLength(2);
    expect(shown().generations.map((g) => g.key)).toEqual([retryKey, key]);
    expect(shown().credits).toBe(9);
  });

  test('that another device was faster with takes that one', async () => {
    const key = await openFailed();
    phone.hold('retry');
    phone.store.retry(key);
    const retryKey = top().key;
    server.retry(server.jobs[0]!.job_id);

    phone.hint();
    await after(10);

    expect(shown().generations.map((g) => g.key)).toEqual([retryKey, key]);
    expect(top()).toMatchObject({ local: null, job: { job_id: server.newest().job_id } });
  });

  test('that failed may be pressed again', async () => {
    const key = await openFailed();
    phone.store.retry(key);
    await after(10);
    server.fail();
    await after(2_000);

    phone.store.retry(key);
    await after(10);

    expect(server.jobs).toHaveLength(3);
  });

  test('that was refused does not hinder another one', async () => {
    const key = await openFailed();
    server.maxActive = 0;
    phone.store.retry(key);
    await after(10);
    server.maxActive = 1;

    phone.store.retry(key);
    await after(10);

    expect(server.jobs).toHaveLength(2);
  });

  test('that was refused may be pressed again', async () => {
    const key = await openFailed();
    server.maxActive = 0;
    phone.store.retry(key);
    await after(10);
    server.maxActive = 1;

    phone.store.retry(top().key);
    await after(10);

    expect(server.newest().retry_of).toBe(server.jobs[0]!.job_id);
    expect(shown().generations).toHaveLength(2);
  });

  test.each(['unsent', 'active', 'completed', 'not on the list'])(
    'of one that is %s does nothing',
    async (state) => {
      await open();
      if (state === 'unsent') phone.goOff();
      const key = press();
      await after(10);
      if (state === 'completed') server.complete();
      phone.hint();
      await after(10);

      phone.store.retry(state === 'not on the list' ? 'nothing' : key);
      phone.goOn();
      await after(10_000);

      expect(server.jobs).toHaveLength(1);
      expect(phone.count('retry')).toBe(0);
    },
  );
});

describe('a picture to start from', () => {
  const source = {
    uri: 'file:///cat.jpg',
    contentType: 'image/jpeg',
    input: 'image',
    isList: false,
  };

  test('is uploaded before the request is sent, to a path of its own', async () => {
    await open();
    phone.hold('uploadSource');

    const key = phone.store.generate(MODEL, 'a cat', { width: 768 }, source);
    await after(10);
    expect(phone.count('enqueue')).toBe(0);
    phone.release('uploadSource');
    await after(10);

    expect(phone.uploads).toEqual([`${USER_ID}/${key}`]);
    expect(server.newest().params).toEqual({ width: 768, image: `${USER_ID}/${key}` });
  });

  test('goes in a list where the model wants one', async () => {
    await open();

    const key = phone.store.generate(MODEL, 'a cat', {}, { ...source, isList: true });
    await after(10);

    expect(server.newest().params).toEqual({ image: [`${USER_ID}/${key}`] });
  });

  test('has the same path however often it is sent', async () => {
    await open();
    phone.network = 'lossy';
    const key = phone.store.generate(MODEL, 'a cat', {}, source);
    await after(10);

    await reopenOffline();
    phone.goOn();
    await after(10_000);

    expect(new Set(phone.uploads)).toEqual(new Set([`${USER_ID}/${key}`]));
    expect(server.jobs).toHaveLength(1);
  });

  test('that is lost is refused', async () => {
    await open();
    phone.files.clear();

    phone.store.generate(MODEL, 'a cat', {}, source);
    await after(10);

    expect(top()).toMatchObject({ local: 'refused', job: { error: { code: 'source_lost' } } });
    expect(phone.count('enqueue')).toBe(0);
  });

  test('is not needed any more when the job is there', async () => {
    await open();

    phone.store.generate(MODEL, 'a cat', {}, source);
    await after(2_000);

    expect(top().source).toBeNull();
  });
});

describe('the device', () => {
  test('in two tabs sends one request twice, which is one job', async () => {
    await open();
    phone.goOff();
    press();
    await after(10);
    phone.goOn();

    const other = phone.newStore();
    other.start();
    await after(10_000);

    expect(phone.count('enqueue')).toBeGreaterThan(1);
    expect(server.jobs).toHaveLength(1);
    expect(shown().generations).toHaveLength(1);
    expect(other.getSnapshot().generations).toHaveLength(1);
    expect(outbox()).toEqual([]);
    other.stop();
  });

  test.each([
    ['text that is no JSON', '{"generations": ['],
    ['nothing', 'null'],
    ['a number', '5'],
    ['a list', '[]'],
    ['other fields', '{"generations": 5, "models": {}}'],
    ['entries of another kind', '{"generations": [5, "text", {"key": 1}], "models": []}'],
    ['a field of another kind', '{"generations": [null, 5, {"key": 1}], "models": 7}'],
  ])('that holds %s does not hinder the start', async (_, text) => {
    phone.stored.set(name('cache'), text);
    phone.stored.set(name('outbox.broken'), text);
    server.addHistory(1);

    await open();
    press();
    await after(10);

    expect(prompts()).toEqual(['a lighthouse', 'older 0']);
    expect(shown().models).toHaveLength(3);
  });

  test('whose cache is broken still sends what was pressed', async () => {
    await open();
    phone.goOff();
    press();
    await after(10);
    phone.stored.set(name('cache'), '{');

    await reopenOffline();
    phone.goOn();
    await after(10_000);

    expect(server.jobs).toHaveLength(1);
  });

  test('that holds one broken request still sends the others', async () => {
    await open();
    phone.goOff();
    press();
    await after(10);
    phone.stored.set(name('outbox.broken'), '{');

    await reopenOffline();
    expect(prompts()).toEqual(['a lighthouse']);
    phone.goOn();
    await after(10_000);

    expect(server.jobs).toHaveLength(1);
  });

  test('that holds a request and its job shows one card', async () => {
    await open();
    phone.goOff();
    press();
    await after(10);
    const request = phone.stored.get(outbox()[0]!)!;
    phone.goOn();
    await after(10_000);
    phone.stored.set(name(`outbox.${top().key}`), request);

    await reopenOffline();
    expect(shown().generations).toHaveLength(1);
    phone.goOn();
    await after(10_000);

    expect(shown().generations).toHaveLength(1);
    expect(server.jobs).toHaveLength(1);
  });

  test('keeps apart what the server has and what it has not', async () => {
    await open();
    press('sent');
    await after(10);
    phone.goOff();
    press('unsent');
    await after(10);

    const cache = phone.stored.get(name('cache'))!;

    expect(cache).not.toContain('unsent');
    expect(outbox()).toHaveLength(1);
  });

  test('does not show what belongs to others', async () => {
    await open();
    phone.goOff();
    press();
    await after(10);
    const mine = [...phone.stored];
    phone.stored.clear();
    for (const [key, text] of mine) phone.stored.set(key.replace(USER_ID, 'somebody-else'), text);

    await reopenOffline();

    expect(shown().generations).toEqual([]);
    expect(shown().models).toEqual([]);
  });

  test('that cannot be read does not hinder the start', async () => {
    phone.isStorageBroken = true;
    server.addHistory(1);

    await open();

    expect(prompts()).toEqual(['older 0']);
  });

  test('that is slow shows what was pressed meanwhile above what it has', async () => {
    server.addHistory(1);
    await open();
    phone.kill();
    phone.storageLatency = 500;
    phone.open();

    press();
    await after(10_000);

    expect(prompts()).toEqual(['a lighthouse', 'older 0']);
  });
});

describe('start and stop', () => {
  test('in a row leave one listener and lose nothing', async () => {
    phone.open();
    phone.store.stop();
    phone.store.start();
    await after(10);

    expect(phone.listening()).toBe(1);
    expect(phone.count('page')).toBe(1);
    press();
    await after(10);
    expect(server.jobs).toHaveLength(1);
  });

  test('of the app listen anew each time it is shown', async () => {
    await open();

    phone.hide();
    expect(phone.listening()).toBe(0);
    phone.show();

    expect(phone.listening()).toBe(1);
  });

  test('stop ends all requests', async () => {
    await open();
    press();
    await after(10);
    phone.forgetRequests();

    phone.store.stop();
    phone.hint();
    phone.show();
    await after(60_000);

    expect(phone.count()).toBe(0);
    expect([phone.listening(), phone.watching()]).toEqual([0, 0]);
    expect(jest.getTimerCount()).toBe(0);
  });

  test('stop ends all writing: the user may have signed out', async () => {
    await open();
    phone.latency = 100;
    press();
    await after(150);

    phone.store.stop();
    phone.stored.clear();
    await after(10_000);

    expect([...phone.stored]).toEqual([]);
  });

  test('stop while a request is on its way does not send the next', async () => {
    await open();
    phone.latency = 100;
    press('one');
    press('two');
    await after(50);

    phone.store.stop();
    await after(10_000);

    expect(server.jobs.map(({ prompt }) => prompt)).toEqual(['one']);
  });

  test('a subscriber that left is not told', async () => {
    await open();
    const tell = jest.fn();
    const leave = phone.store.subscribe(tell);

    leave();
    press();

    expect(tell).not.toHaveBeenCalled();
  });

  test('the snapshot is the same until something changes', async () => {
    await open();
    const before = shown();

    expect(shown()).toBe(before);
    press();

    expect(shown()).not.toBe(before);
  });
});

describe('what is done with a picture', () => {
  const failure = (promise: Promise<void>) => promise.then(() => null, (error: Error) => error);

  /** The app is open and shows two pictures, the newest of which is shared. */
  async function openWithTwo(): Promise<void> {
    server.addHistory(2);
    server.newest().images[0]!.is_public = true;
    await open();
  }

  test('is shown at once and kept by the server', async () => {
    await openWithTwo();

    const done = phone.store.favorite(top(), true);

    expect(top().job.is_favorite).toBe(true);
    await after(10);
    await done;
    expect(server.newest().is_favorite).toBe(true);
    expect(top().job.is_favorite).toBe(true);
  });

  test.each<[string, () => Promise<void>]>([
    ['a favorite', () => phone.store.favorite(top(), true)],
    ['a removal', () => phone.store.remove(top())],
    ['the end of a share', () => phone.store.share(top(), 0, false)],
  ])('is as it was before, and said, where the network is off: %s', async (_, change) => {
    await openWithTwo();
    const before = shown().generations;
    phone.goOff();

    const failed = failure(change());
    expect(shown().generations).not.toEqual(before);
    await after(10);

    expect(await failed).toMatchObject({ token: 'unreachable' });
    expect(shown().generations).toEqual(before);
  });

  test('is not undone by a read that was under way', async () => {
    await openWithTwo();
    const release = phone.holdNext('page');
    phone.show();
    await after(10);
    const views: boolean[] = [];
    phone.store.subscribe(() => views.push(top().job.is_favorite));

    const done = phone.store.favorite(top(), true);
    await after(10);
    release();
    await after(10);
    await done;

    expect(new Set(views)).toEqual(new Set([true]));
  });

  test('done twice ends as it was pressed last', async () => {
    await openWithTwo();
    phone.latency = 100;
    const views: boolean[] = [];
    phone.store.subscribe(() => views.push(top().job.is_favorite));

    void phone.store.favorite(top(), true);
    void phone.store.favorite(top(), false);
    await after(2_000);

    expect(server.newest().is_favorite).toBe(false);
    expect(views).toEqual([true, ...views.slice(1).map(() => false)]);
  });

  test('waits while the app is hidden', async () => {
    await openWithTwo();
    phone.hide();

    void phone.store.favorite(top(), true);
    await after(60_000);
    expect(phone.count()).toBe(0);
    phone.show();
    await after(10);

    expect(server.newest().is_favorite).toBe(true);
  });

  test('takes a card away, also after a restart without a network', async () => {
    await openWithTwo();

    const done = phone.store.remove(top());
    expect(prompts()).toEqual(['older 0']);
    await after(10);
    await done;
    expect(server.newest().isDeleted).toBe(true);
    await reopenOffline();

    expect(prompts()).toEqual(['older 0']);
  });

  test('taken away and back, a card is in its place, and its picture private', async () => {
    await openWithTwo();
    const [removed, other] = shown().generations;
    void phone.store.remove(removed!);
    await after(10);

    void phone.store.restore(removed!);
    await after(2_000);

    expect(prompts()).toEqual(['older 1', 'older 0']);
    expect(top()).toMatchObject({ key: removed!.key, local: null });
    expect(top().job.images).toMatchObject([{ is_public: false }]);
    expect(shown().generations[1]).toEqual(other);
  });

  test('taken back before it was answered, it is as if it had not been', async () => {
    await openWithTwo();
    phone.latency = 100;
    const { generations: [removed] } = shown();

    void phone.store.remove(removed!);
    void phone.store.restore(removed!);
    await after(3_000);

    expect(server.newest().isDeleted).toBe(false);
    expect(prompts()).toEqual(['older 1', 'older 0']);
  });

  test('that is gone cannot be brought back, and shows no card', async () => {
    await openWithTwo();
    const { generations: [removed] } = shown();
    void phone.store.remove(removed!);
    await after(10);
    server.refusal = new DarkroomError('not_found', 404);

    const failed = failure(phone.store.restore(removed!));
    await after(2_000);

    expect(await failed).toMatchObject({ token: 'not_found' });
    expect(prompts()).toEqual(['older 0']);
  });

  test('shares one picture of several', async () => {
    server.addHistory(1);
    const [image] = server.newest().images;
    server.newest().images.push({ ...image!, position: 1, path: 'second' });
    await open();

    void phone.store.share(top(), 1, true);
    await after(10);

    expect(top().job.images.map(({ is_public }) => is_public)).toEqual([false, true]);
    expect(server.newest().images.map(({ is_public }) => is_public)).toEqual([false, true]);
  });
});
