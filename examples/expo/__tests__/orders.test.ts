/**
 * Whatever the order in which things happen to a request, in the end there is one job, one charge
 * and one card, and the card shows what the server says. Every order is tried.
 */
import { FakePhone, FakeServer, MODEL } from './fakeServer';

class World {
  readonly server = new FakeServer();
  readonly phone = new FakePhone(this.server);
  key = '';

  card = () => this.phone.store.getSnapshot().generations.find(({ key }) => key === this.key);
}

type Event = (world: World) => void;

const after = (ms: number) => jest.advanceTimersByTimeAsync(ms);

const EVENTS: Record<string, Event> = {
  'the answer arrives': ({ phone }) => phone.release('enqueue'),
  'the answer to the retry arrives': ({ phone }) => phone.release('retry'),
  'the answer to the cancellation arrives': ({ phone }) => phone.release('cancel'),
  'a hint comes': ({ phone }) => phone.hint(),
  'the app is killed': ({ phone }) => (phone.kill(), void phone.open()),
  'cancel is pressed': ({ phone, key }) => void phone.store.cancel(key),
  'it begins': ({ server }) => server.jobs.forEach((job) => server.begin(job)),
  'it is completed': ({ server }) => server.jobs.forEach((job) => server.complete(job)),
  'it fails': ({ server }) => server.jobs.forEach((job) => server.fail(job)),
  'it is canceled elsewhere': ({ server }) =>
    server.jobs.forEach((job) => server.stopCanceled(job)),
  'time passes': () => undefined,
};
/** These last until the next thing has happened. */
const STATES: Record<string, [Event, Event]> = {
  'the app is hidden': [({ phone }) => phone.hide(), ({ phone }) => phone.show()],
  'the network is off': [({ phone }) => phone.goOff(), ({ phone }) => phone.goOn()],
  'answers are lost': [({ phone }) => (phone.network = 'lossy'), ({ phone }) => phone.goOn()],
};

function* ordersOf(names: readonly string[]): Generator<string[]> {
  if (names.length === 0) yield [];
  for (const name of names) {
    for (const rest of ordersOf(names.filter((other) => other !== name))) yield [name, ...rest];
  }
}

async function play(order: readonly string[], world: World): Promise<void> {
  let ends: Event | undefined;
  for (const name of order) {
    const [begins, lasting] = STATES[name] ?? [EVENTS[name]!];
    begins(world);
    await after(name === 'time passes' ? 3_000 : 10);
    ends?.(world);
    ends = lasting;
  }
  ends?.(world);
}

/** All is well again, but nobody tells the app; what has not ended ends, and time passes. */
async function heal(world: World, end: Event): Promise<void> {
  const { phone } = world;
  (['enqueue', 'retry', 'cancel'] as const).forEach((call) => phone.release(call));
  phone.goOn();
  await after(40_000);
  end(world);
  await after(40_000);
}

/** What holds for every order. */
function check({ server, phone }: World, jobCount: number): void {
  const { generations, credits, isOnline } = phone.store.getSnapshot();
  expect(server.jobs).toHaveLength(jobCount);
  expect(server.charges()).toBe(jobCount);
  expect(generations.map(({ local, job }) => [local, job.job_id, job.status])).toEqual(
    server.page(null).generations.map(({ job_id, status }) => [null, job_id, status]),
  );
  expect(credits).toBe(server.balance);
  expect(isOnline).toBe(true);
  expect(phone.requestsWhileHidden).toBe(0);
  expect(phone.count()).toBeLessThan(50);
  expect([...phone.stored.keys()].filter((name) => name.includes('outbox'))).toEqual([]);
  expect(jest.getTimerCount()).toBe(0);
}

/** Plays every order of these events after `begin`, then checks. */
async function inEveryOrder(
  names: readonly string[],
  begin: (world: World) => Promise<void>,
  finish: (world: World) => Promise<void>,
): Promise<void> {
  for (const order of ordersOf(names)) {
    const world = new World();
    world.phone.open();
    await after(10);
    await begin(world);
    await play(order, world);
    try {
      await finish(world);
    } catch (error) {
      throw new Error(`${order.join(', ')}:\n${(error as Error).message}`);
    }
    world.phone.store.stop();
  }
}

async function press(world: World): Promise<void> {
  world.phone.hold('enqueue');
  world.key = world.phone.store.generate(MODEL, 'a lighthouse', {});
  await after(1);
}

jest.setTimeout(600_000); // five thousand orders take a while on a busy machine
beforeEach(() => jest.useFakeTimers());

const TROUBLE = ['the app is hidden', 'the network is off', 'the app is killed'];

test.each(['it is completed', 'it fails', 'it is canceled elsewhere'])(
  'a request whose job ends (%s) is one job, one charge and one card',
  async (end) => {
    const names = ['the answer arrives', 'a hint comes', 'time passes', end, ...TROUBLE];

    await inEveryOrder(names, press, async (world) => {
      await heal(world, EVENTS[end]!);

      check(world, 1);
      expect(world.card()?.job).toEqual(world.server.page(null).generations[0]);
    });
  },
);

test.each(['off', 'lossy'] as const)(
  'a request pressed while the network is %s is one job, one charge and one card',
  async (network) => {
    const names = ['the answer arrives', 'a hint comes', 'time passes', ...TROUBLE];
    const begin = async (world: World) => {
      world.phone.network = network;
      await press(world);
    };

    await inEveryOrder(names, begin, async (world) => {
      await heal(world, EVENTS['it is completed']!);

      check(world, 1);
      expect(world.card()?.job.status).toBe('completed');
    });
  },
);

test.each(['queued', 'processing'])('a canceled request (%s) is refunded', async (status) => {
  const answers = ['the answer arrives', 'the answer to the cancellation arrives'];
  const begin = async (world: World) => {
    await press(world);
    if (status === 'processing') world.server.begin();
    world.phone.hold('cancel');
  };

  await inEveryOrder(['cancel is pressed', ...answers, ...TROUBLE], begin, async (world) => {
    await heal(world, EVENTS['it is canceled elsewhere']!);

    check(world, 1);
    expect(world.server.newest().cancel_requested).toBe(status === 'processing');
    expect(world.card()?.job).toMatchObject({ status: 'canceled', refunded_credits: 1 });
  });
});

test('a retry of what failed is one more job, one more charge and one more card', async () => {
  const names = ['the answer to the retry arrives', 'a hint comes', 'it is completed', ...TROUBLE];
  const begin = async (world: World) => {
    world.server.enqueue(MODEL.id, 'a lighthouse', {}, null);
    world.server.fail();
    world.phone.show();
    await after(10);
    world.phone.hold('retry');
    const { store } = world.phone;
    store.retry(store.getSnapshot().generations[0]!.key);
    await after(1);
  };

  await inEveryOrder(names, begin, async (world) => {
    await heal(world, EVENTS['it is completed']!);

    check(world, 2);
    expect(world.server.newest().retry_of).toBe(world.server.jobs[0]!.job_id);
  });
});
