/* Lets the search run from disk. Browsers start no worker from a file, so its script runs in a hidden frame. */
if (location.protocol === "file:") {
  /* The theme looks for this name. */
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      this.frame.worker = this;
      const setup =
        'postMessage = data => frameElement.worker.dispatchEvent(new MessageEvent("message", { data }));' +
        "importScripts = (...urls) => urls.reduce((before, src) => before.then(() => new Promise((done, failed) =>" +
        ' document.body.append(Object.assign(document.createElement("script"), { src, onload: done, onerror: failed }))' +
        ")), Promise.resolve());";
      this.frame.srcdoc = `<body><script>${setup}</script><script src="${url}"></script></body>`;
      this.frame.addEventListener("load", () => {
        this.loaded = true;
        this.waiting.forEach(data => this.postMessage(data));
      });
      this.addEventListener("message", event => this.onmessage && this.onmessage(event));
      document.body.append(this.frame);
    }
    postMessage(data) {
      if (!this.loaded) this.waiting.push(data);
      else this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }));
    }
    terminate() {
      this.frame.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
