// One request by an unmodified client of Node.js: `node_client.cjs https|fetch|http2|worker URL`; prints the answer, or an error and exits 1.
const [, , library, url] = process.argv;

const clients = {
  https: () => new Promise((done, failed) => {
    require('node:https').get(url, { timeout: 60000 }, (answer) => {
      let body = '';
      answer.on('data', (part) => { body += part; }).on('end', () => done(body)).on('error', failed);
    }).on('error', failed);
  }),
  fetch: async () => (await fetch(url, { signal: AbortSignal.timeout(60000) })).text(),
  http2: () => new Promise((done, failed) => {
    const { origin, pathname } = new URL(url);
    const session = require('node:http2').connect(origin).on('error', failed);
    const stream = session.request({ ':path': pathname }).on('error', failed);
    let body = '';
    stream.setEncoding('utf8').on('data', (part) => { body += part; }).on('end', () => { session.close(); done(body); });
    stream.end();
  }),
  worker: () => new Promise((done, failed) => {
    const { Worker } = require('node:worker_threads');
    const worker = new Worker(`
      const { parentPort } = require('node:worker_threads');
      require('node:https').get(${JSON.stringify(url)}, (answer) => {
        let body = '';
        answer.on('data', (part) => { body += part; }).on('end', () => parentPort.postMessage(body));
      });`, { eval: true });
    worker.on('message', done).on('error', failed);
  }),
};

clients[library]().then((body) => { console.log(body); process.exit(0); }, (error) => { console.error(String(error.cause || error)); process.exit(1); });
