"""llama.cpp's flags that mpillama knows but does not have.

A flag in ``IGNORED`` changes only speed or looks in llama.cpp: it is accepted, with its value, and noted. A flag in
``UNSUPPORTED`` changes what is computed or asks for something else altogether: it is refused by name, so that nobody
takes it for a typing error. Each line is one flag of ``common/arg.cpp``: all of its names, then a word for each value
it takes. Flags of llama.cpp's other programs (perplexity, imatrix, training, …) are left out; a few that it has
removed, like ``--mlock``, are kept because people still type them.
"""

from __future__ import annotations

from dataclasses import dataclass

IGNORED = """
-ngl --gpu-layers --n-gpu-layers N
-mg --main-gpu INDEX
-fa --flash-attn on|off|auto
-fitt --fit-target MiB0,MiB1,...
-kvo --kv-offload
-nkvo --no-kv-offload
--repack
-nr --no-repack
--no-host
--op-offload
--no-op-offload
-bs --backend-sampling
-lm --load-mode MODE
-lzm --lazy-mode MODE
--mmap
--no-mmap
--mlock
-dio --direct-io
-ndio --no-direct-io
--numa TYPE
-tb --threads-batch N
-C --cpu-mask M
-Cr --cpu-range lo-hi
--cpu-strict 0|1
--prio N
--poll 0...100
-Cb --cpu-mask-batch M
-Crb --cpu-range-batch lo-hi
--cpu-strict-batch 0|1
--prio-batch N
--poll-batch 0|1
--check-tensors
--swa-full
-kvu --kv-unified
-no-kvu --no-kv-unified
-dt --defrag-thold N
-cb --cont-batching
-nocb --no-cont-batching
--no-context-shift
--warmup
--no-warmup
--simple-io
--prompt-cache-all
-co --color on|off|auto
-no-cnv --no-conversation
-lv --verbosity --log-verbosity N
--log-colors on|off|auto
--log-prefix
--no-log-prefix
--log-timestamps
--no-log-timestamps
--no-log-jsonl
"""

UNSUPPORTED = """
-cl --cache-list
--completion-bash
--server-base URL
--verbose-prompt
-lcs --lookup-cache-static FNAME
-lcd --lookup-cache-dynamic FNAME
--keep N
--context-shift
-bf --binary-file FNAME
-ptc --print-token-count N
-cnv --conversation
-i --interactive
-if --interactive-first
-mli --multiline-input
--in-prefix-bos
--in-prefix STRING
--in-suffix STRING
--show-timings
--no-show-timings
-gan --grp-attn-n N
-gaw --grp-attn-w N
-ot --override-tensor PATTERN=TYPE,...
-cmoe --cpu-moe
-ncmoe --n-cpu-moe N
-ncffn --n-cpu-ffn N
--rpc SERVERS
--lora FNAME
--lora-scaled FNAME:SCALE,...
--lora-init-without-apply
--control-vector FNAME
--control-vector-scaled FNAME:SCALE,...
--control-vector-layer-range START END
-mu --model-url URL
-dr --docker-repo MODEL
-mm --mmproj FILE
-mmu --mmproj-url URL
--mmproj-auto
--no-mmproj --no-mmproj-auto
--mmproj-offload
--no-mmproj-offload
-mmdev --mmproj-device DEVICE
--image --audio --video FILE
--image-min-tokens N
--image-max-tokens N
--video-fps N
--video-timestamp-interval N
--video-ffmpeg-dir DIR
--chat-template-kwargs STRING
--reasoning-format FORMAT
-rea --reasoning on|off|auto
--reasoning-effort LEVEL
--reasoning-budget-message MESSAGE
--reasoning-preserve
--no-reasoning-preserve
--skip-chat-parsing
--no-skip-chat-parsing
-o --output --output-file FNAME
--log-jsonl
--log-prompts-dir PATH
-ctxcp --ctx-checkpoints --swa-checkpoints N
-cms --checkpoint-min-step N
-cram --cache-ram N
--kv-unified-per-slot N
--spm-infill
--pooling TYPE
--tags STRING
--reuse-port
--path PATH
--api-prefix PREFIX
--ssl-key-file FNAME
--ssl-cert-file FNAME
--threads-http N
--cache-prompt
--no-cache-prompt
--cache-reuse N
--metrics
--props
--slots
--no-slots
--embedding --embeddings
--rerank --reranking
--prefill-assistant
--no-prefill-assistant
-sps --slot-prompt-similarity SIMILARITY
--spec-draft-model -md --model-draft FNAME
--spec-draft-hf -hfd -hfrd --hf-repo-draft MODEL
--spec-draft-threads -td --threads-draft N
--spec-draft-threads-batch -tbd --threads-batch-draft N
--spec-draft-type-k -ctkd --cache-type-k-draft TYPE
--spec-draft-type-v -ctvd --cache-type-v-draft TYPE
--spec-draft-override-tensor -otd --override-tensor-draft PATTERN=TYPE,...
--spec-draft-cpu-moe -cmoed --cpu-moe-draft
--spec-draft-n-cpu-moe --spec-draft-ncmoe -ncmoed --n-cpu-moe-draft N
--spec-draft-n-max N
--spec-draft-n-min N
--spec-draft-p-split --draft-p-split P
--spec-draft-p-min --draft-p-min P
--spec-draft-device -devd --device-draft dev1,dev2,...
--spec-draft-ngl -ngld --gpu-layers-draft --n-gpu-layers-draft N
--spec-type TYPE
--spec-default
--draft --draft-n --draft-max N
--draft-min --draft-n-min N
--cache-idle-slots
--no-cache-idle-slots
--mtmd-batch-max-tokens N
--embd-normalize N
--cors-origins ORIGINS
--cors-methods METHODS
--cors-headers HEADERS
--cors-credentials
--no-cors-credentials
--ui-config --webui-config JSON
--ui-config-file --webui-config-file PATH
--ui-mcp-proxy --webui-mcp-proxy
--no-ui-mcp-proxy --no-webui-mcp-proxy
--tools TOOL1,TOOL2,...
--tools-runtime OPTION
--mcp-servers-config PATH
--mcp-servers-json JSON
--ui --webui
--no-ui --no-webui
--sse-ping-interval N
--media-path PATH
--models-dir PATH
--models-preset PATH
--models-max N
--models-autoload
--no-models-autoload
--sleep-idle-seconds SECONDS
--spec-draft-cpu-mask -Cd --cpu-mask-draft M
--spec-draft-cpu-range -Crd --cpu-range-draft lo-hi
--spec-draft-cpu-strict --cpu-strict-draft 0|1
--spec-draft-prio --prio-draft N
--spec-draft-poll --poll-draft 0|1
--spec-draft-cpu-mask-batch -Cbd --cpu-mask-batch-draft M
--spec-draft-cpu-strict-batch --cpu-strict-batch-draft 0|1
--spec-draft-prio-batch --prio-batch-draft N
--spec-draft-poll-batch --poll-batch-draft 0|1
--spec-synth-len L
--spec-synth-rates P0,P1,...
--spec-draft-backend-sampling
--no-spec-draft-backend-sampling
--spec-ngram-mod-n-min N
--spec-ngram-mod-n-max N
--spec-ngram-mod-n-match N
--spec-ngram-simple-size-n N
--spec-ngram-simple-size-m N
--spec-ngram-simple-min-hits N
--spec-ngram-map-k-size-n N
--spec-ngram-map-k-size-m N
--spec-ngram-map-k-min-hits N
--spec-ngram-map-k4v-size-n N
--spec-ngram-map-k4v-size-m N
--spec-ngram-map-k4v-min-hits N
--spec-ngram-size-n N
--spec-ngram-size-m N
--spec-ngram-min-hits N
--embd-gemma-default
--fim-qwen-1.5b-default
--fim-qwen-3b-default
--fim-qwen-7b-default
--fim-qwen-7b-spec
--fim-qwen-14b-spec
--fim-qwen-30b-default
--gpt-oss-20b-default
--gpt-oss-120b-default
--vision-gemma-4b-default
--vision-gemma-12b-default
"""


@dataclass(frozen=True)
class ForeignFlag:
    """A flag of llama.cpp that is not mpillama's: its names, how many values follow it, whether it is harmless."""

    names: tuple[str, ...]
    arity: int
    ignored: bool


def foreign_flags() -> dict[str, ForeignFlag]:
    """Return the flags of both tables by each of their names."""
    flags = {}
    for table, ignored in ((IGNORED, True), (UNSUPPORTED, False)):
        for line in table.split("\n"):
            words = line.split()
            names = tuple(word for word in words if word.startswith("-"))
            for name in names:
                flags[name] = ForeignFlag(names, len(words) - len(names), ignored)
    return flags
