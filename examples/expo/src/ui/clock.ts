/** The server's time, as far as it is known: a device's own may be anything. */
let ahead = 0;

export const setClock = (serverTime: string) => {
  ahead = Date.parse(serverTime) - Date.now();
};

export const now = () => Date.now() + ahead;
