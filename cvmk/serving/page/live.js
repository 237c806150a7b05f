// A live stream that takes itself up again: when the connection breaks, and when something is changed that has been translated already.
// Places in the text are counted in characters (code points), as the server counts them. What a sentence's translation is, once final, stays, and is not sent again.

const PART = 4000; // characters of a message
const FIRST_WAIT = 300, LONGEST_WAIT = 10_000; // ms, between two attempts
const SETTLED = 3000; // ms of a connection, after which it counts as sound
const LAST_WORD = 600; // ms without a key, after which the last word is taken to be whole
const LAST_SENTENCE = 2500; // ms likewise, for a sentence that has its full stop
const FOR_THE_USER = new Set(["INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "UNIMPLEMENTED", "UNAUTHENTICATED", "PERMISSION_DENIED"]);
const POLICY = { retranslation: { mask: 0 } }; // show all; what may change is dimmed

export class Live {
  #url; #on; #languages = null; #token = "";
  #socket = null; #opened = false; #attempts = 0; #timer = 0; #pause = 0; #ending = 0; #failure = null;
  #text = []; // all that the server has, or is to have
  #base = 0; // where the stream's text begins in it
  #ended = -1; // the text's length when its last sentence was ended by hand
  #seq = 0; #revision = 0;
  #sent = new Map(); // events by seq that nothing has been heard of: when they were sent, and the place in the text that they change
  #known = null; // the open sentence: its number, and where in the stream it begins; null while that is not known
  #done = []; // sentences that are final: {end, text}
  #committed = ""; #tentative = "";

  // on: {shown(sentences, tentative), state(name), opened({model, target}), detected(code), error(error), latency(ms)}
  constructor(url, on) {
    this.#url = url;
    this.#on = on;
  }

  // Translate a text from and to these languages, all of it anew.
  start(source, target, text) {
    this.#languages = { source, target };
    this.#text = Array.from(text);
    this.#attempts = 0;
    this.#reopen(0);
    this.#show();
  }

  // What the user gave as a key.
  set token(token) {
    this.#token = token;
    this.retry();
  }

  // Leave the server alone until `retry`, or until something is written.
  rest() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#drop();
    this.#on.state("resting");
  }

  retry() {
    this.#attempts = 0;
    if (this.#languages) this.#reopen(this.#done.length);
  }

  // The text is this now.
  write(text) {
    clearTimeout(this.#pause);
    clearTimeout(this.#ending);
    this.#change(Array.from(text));
    if (/\S$/.test(text)) this.#pause = setTimeout(() => this.#change(Array.from(`${text} `)), LAST_WORD);
    if (/[.!?…。！？]["'”’»)\]]*\s*$/.test(text)) this.#ending = setTimeout(() => this.end(), LAST_SENTENCE);
  }

  // The last sentence ends here.
  end() {
    this.#ended = this.#text.length;
    this.#send({ end_segment: {} });
  }

  // -- the text ---------------------------------------------------------------------------------------------------------------------------
  #change(text) {
    const before = this.#text;
    let same = 0;
    while (same < before.length && same < text.length && before[same] === text[same]) same++;
    if (same === before.length && same === text.length) return;
    const first = this.#firstAt(same); // while the text is what it was
    this.#text = text;
    if (!this.#opened) {
      if (same < before.length && first < this.#done.length) {
        this.#done.length = first;
        this.#show();
      }
      if (!this.#socket && !this.#timer && (this.#failure?.status ?? "INVALID_ARGUMENT") === "INVALID_ARGUMENT") this.#connect(); // it may have been the text
    } else if (same === before.length) {
      this.#append(same);
    } else if (this.#known && same >= this.#base + this.#known.begin && first === this.#done.length) {
      const from_char = same - this.#base - this.#known.begin;
      const rest = text.slice(same);
      this.#event("replace", same, { segment: this.#known.segment, from_char, text: rest.slice(0, PART).join("") });
      this.#append(same + PART);
    } else {
      this.#reopen(first);
    }
  }

  #append(from) {
    for (let place = from; place < this.#text.length; place += PART) this.#event("append", Infinity, { text: this.#text.slice(place, place + PART).join("") });
  }

  // The first sentence that a change at a place may change: whether one ends is decided by the first character behind it that is no white space.
  #firstAt(place) {
    const found = this.#done.findIndex(({ end }) => this.#behind(end) >= place);
    return found < 0 ? this.#done.length : found;
  }

  // The first place from this on that is no white space.
  #behind(place) {
    while (place < this.#text.length && /\s/.test(this.#text[place])) place++;
    return place;
  }

  // -- the connection ---------------------------------------------------------------------------------------------------------------------
  // A new stream, from a sentence on.
  #reopen(sentence) {
    this.#drop();
    this.#done.length = Math.min(sentence, this.#done.length);
    this.#show();
    this.#connect();
  }

  #drop() {
    if (this.#socket) {
      this.#socket.onopen = this.#socket.onclose = this.#socket.onmessage = null;
      this.#socket.close();
    }
    this.#gone();
  }

  // There is no connection. A sentence that was translated before the server heard of a change to it is not final.
  #gone() {
    this.#socket = null;
    this.#opened = false;
    const place = Math.min(...Array.from(this.#sent.values(), (event) => event.place));
    this.#done.length = Math.min(this.#firstAt(place), this.#done.length);
    this.#sent.clear();
  }

  #connect() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#opened = false;
    this.#failure = null;
    this.#on.state("connecting");
    const socket = (this.#socket = new WebSocket(this.#url, "cvmk.v1"));
    const begun = performance.now();
    socket.onopen = () => this.#open();
    socket.onmessage = (message) => this.#received(JSON.parse(message.data));
    socket.onclose = () => {
      this.#gone();
      this.#show();
      if (performance.now() - begun > SETTLED) this.#attempts = 0;
      this.#lost();
    };
  }

  #open() {
    this.#base = this.#done.at(-1)?.end ?? 0;
    this.#seq = this.#revision = 0;
    this.#committed = "";
    this.#known = { segment: this.#done.length, begin: 0 };
    const first = { open: { ...this.#languages, policy: POLICY, first_segment: this.#done.length } };
    if (this.#token) first.token = this.#token;
    this.#socket.send(JSON.stringify(first));
    this.#opened = true;
    this.#append(this.#base);
    if (this.#ended === this.#text.length && this.#ended > this.#base) this.#send({ end_segment: {} });
  }

  // Try again, unless it is for the user to do something first, or there is nothing to do.
  #lost() {
    const failure = this.#failure;
    if (failure && FOR_THE_USER.has(failure.status)) {
      this.#on.state("failed");
      this.#on.error(failure);
      return;
    }
    if (failure?.status === "DEADLINE_EXCEEDED" && this.#text.length === this.#behind(this.#done.at(-1)?.end ?? 0)) {
      this.#failure = null;
      this.#on.state("resting");
      return;
    }
    const wait = Math.max(1000 * (failure?.retry_after ?? 0), Math.min(LONGEST_WAIT, FIRST_WAIT * 2 ** this.#attempts) * (0.5 + Math.random() / 2));
    this.#attempts++;
    this.#on.error(failure);
    this.#on.state("waiting");
    this.#timer = setTimeout(() => this.#connect(), wait);
  }

  #event(name, place, event) {
    this.#sent.set(++this.#seq, { time: performance.now(), place });
    this.#send({ [name]: { seq: this.#seq, ...event } });
  }

  #send(message) {
    if (this.#opened && this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify({ ack_revision: this.#revision, ...message }));
  }

  // -- what comes -------------------------------------------------------------------------------------------------------------------------
  #received(message) {
    if (message.error) {
      this.#failure = message.error;
      return;
    }
    if (message.opened) {
      this.#on.state("open");
      this.#on.error(null);
      this.#on.opened(message.opened);
      return;
    }
    const { segment = 0, revision = 0, committed_delta = "", tentative = "", source_chars_read = 0, seq_read = 0, segment_begin = 0, final = false } = message;
    this.#revision = revision;
    this.#send({});
    if (message.language) this.#on.detected(message.language.code ?? "");
    if (message.refused) { // the sentence was translated before the change came
      this.#reopen(this.#done.length);
      return;
    }
    this.#measure(seq_read);
    this.#committed += committed_delta;
    this.#tentative = tentative;
    this.#known = final ? null : { segment, begin: segment_begin };
    if (final) {
      this.#done.push({ end: this.#base + source_chars_read, text: this.#committed });
      this.#committed = "";
    }
    this.#show();
  }

  #measure(seq) {
    const sent = this.#sent.get(seq);
    if (sent) this.#on.latency(performance.now() - sent.time);
    for (const older of this.#sent.keys()) if (older <= seq) this.#sent.delete(older);
  }

  #show() {
    let place = 0, before = "";
    const sentences = this.#done.map(({ end, text }) => {
      const shown = this.#gap(place, before) + text;
      [place, before] = [end, text];
      return shown;
    });
    const gap = this.#committed || this.#tentative ? this.#gap(place, before) : "";
    this.#on.shown(sentences, this.#committed ? gap + this.#committed : "", this.#committed ? this.#tentative : gap + this.#tentative);
  }

  // What stands between two sentences: what does in the text; a space where nothing does, and the translation's full stop needs one.
  #gap(place, before) {
    return this.#text.slice(place, this.#behind(place)).join("") || (/[.!?…]["'”’»)]*$/.test(before) ? " " : "");
  }
}
