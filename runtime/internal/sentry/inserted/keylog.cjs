'use strict';
// Writes the TLS keys of Node to SSLKEYLOGFILE, each before the first record that needs it. Node's own --tls-keylog
// writes later. The runtime has every Node program, and each of its worker threads, require this file first.
const fs = require('fs');
const tls = require('tls');

const path = process.env.SSLKEYLOGFILE;
const installed = Symbol.for('kalium.keylog');
const prototype = tls.TLSSocket.prototype;

if (path && !prototype[installed] && typeof prototype._init === 'function') {
  const { openSync, writeSync } = fs;
  const init = prototype._init;
  let descriptor = -1;
  const write = (line) => {
    if (descriptor < 0) descriptor = openSync(path, 'a');
    writeSync(descriptor, line);
  };
  Object.defineProperty(prototype, installed, { value: true });
  prototype._init = function (...rest) {
    const result = Reflect.apply(init, this, rest);
    this.on('keylog', write);
    return result;
  };
}
