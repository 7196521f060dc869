/** What was asked for, newest first; one picture over it; and what is done with them. */
import { type ReactNode, useState } from 'react';

import { type Generation, useGenerations } from '../darkroom';
import { Card, heightOf } from './Card';
import { Columns } from './Columns';
import { Notice, type Said } from './Notice';
import { type Page, Viewer } from './Viewer';
import { problem } from './words';

interface Props {
  darkroom: ReturnType<typeof useGenerations>;
  empty: ReactNode;
  /** Asks anew for what is like this; `source` is one of its pictures, to start from. */
  onStart: (from: Generation, source?: { path: string }) => void;
}

export function Gallery({ darkroom, empty, onStart }: Props) {
  const { generations, isOnline, loadMore } = darkroom;
  const [shown, setShown] = useState(''); // the path of a picture
  const [said, setSaid] = useState<Said | null>(null);

  const retried = new Set(generations.map(({ job }) => job.retry_of));
  const pages = generations.flatMap((generation) =>
    generation.job.images.map((image): Page => ({ generation, image }))
  );
  const at = pages.findIndex(({ image }) => image.path === shown);
  const page = pages[at];

  const tell = (done: Promise<void>) => done.catch((why) => setSaid({ text: problem(why) }));
  function remove(generation: Generation) {
    setShown('');
    if (generation.local === 'refused') return darkroom.cancel(generation.key); // only known here
    setSaid({ text: 'Deleted.', undo: () => void tell(darkroom.restore(generation)) });
    void tell(darkroom.remove(generation));
  }
  function turnTo({ image }: Page) {
    setShown(image.path);
    if (at > pages.length - 5) void loadMore();
  }

  return (
    <>
      <Columns
        generations={generations}
        heightOf={heightOf}
        card={(generation, width) => (
          <Card
            generation={generation}
            width={width}
            isOnline={isOnline}
            hasRetry={retried.has(generation.job.job_id)}
            onOpen={() => setShown(generation.job.images[0]?.path ?? '')}
            onCancel={() => darkroom.cancel(generation.key)}
            onRetry={() => darkroom.retry(generation.key)}
            onEdit={() => onStart(generation)}
            onRemove={() => remove(generation)}
          />
        )}
        empty={empty}
        isOnline={isOnline}
        onNearEnd={loadMore}
      />
      {page && (
        <Viewer
          page={page}
          previous={pages[at - 1] ?? null}
          next={pages[at + 1] ?? null}
          isOnline={isOnline}
          onTurn={turnTo}
          onClose={() => setShown('')}
          onUseAsStart={() => {
            setShown('');
            onStart(page.generation, page.image);
          }}
          onFavorite={(isFavorite) => darkroom.favorite(page.generation, isFavorite)}
          onShare={(isPublic) => darkroom.share(page.generation, page.image.position, isPublic)}
          onRemove={() => remove(page.generation)}
        />
      )}
      {said && <Notice said={said} onEnd={setSaid} />}
    </>
  );
}
