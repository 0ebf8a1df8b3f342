r"""llama.cpp's flags, variables and programs that mpillama knows but does not have.

A flag in ``IGNORED`` changes only speed or looks in llama.cpp: it is accepted, with its value, and noted. One in
``ACCEPTED`` asks for what a command does anyway, and is accepted there and nowhere else. A flag in ``UNSUPPORTED``
changes what is computed or asks for something else altogether: it is refused by name, so that nobody takes it for a
typing error.

Each line is one flag of ``common/arg.cpp``: all of its names, then a word for each value it takes, then ``$X`` for its
variable ``LLAMA_ARG_X``, then perhaps ``|`` and what to say about it: why it has no effect, or what to do instead. A
line that begins with ``|`` says that about all flags down to the next empty line. A value in brackets may be left out:
older versions had a switch there. Of one in braces, only these words ask for what is done anyway.

Flags of llama.cpp's other programs (perplexity, imatrix, training, …) are left out; a few that it has removed, like
``--mlock``, are kept because people still type them.
"""

from __future__ import annotations

IGNORED = """
| GPUs are used with -dev cuda:0 or --backend cuda
-ngl --gpu-layers --n-gpu-layers N $N_GPU_LAYERS
-mg --main-gpu INDEX $MAIN_GPU

-fa --flash-attn [on|off|auto] $FLASH_ATTN
-fitt --fit-target MiB0,MiB1,... $FIT_TARGET
-kvo --kv-offload $KV_OFFLOAD
-nkvo --no-kv-offload $NO_KV_OFFLOAD
--repack $REPACK
-nr --no-repack $NO_REPACK
--no-host $NO_HOST
--op-offload
--no-op-offload
-bs --backend-sampling $BACKEND_SAMPLING
-lm --load-mode MODE $LOAD_MODE
-lzm --lazy-mode MODE $LAZY_MODE
--mmap $MMAP
--no-mmap $NO_MMAP
--mlock $MLOCK
-dio --direct-io $DIO
-ndio --no-direct-io $NO_DIO
--numa TYPE $NUMA
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
--swa-full $SWA_FULL
-kvu --kv-unified $KV_UNIFIED
-no-kvu --no-kv-unified $NO_KV_UNIFIED
-dt --defrag-thold N $DEFRAG_THOLD
-cb --cont-batching $CONT_BATCHING
-nocb --no-cont-batching $NO_CONT_BATCHING
--warmup
--no-warmup
--simple-io
--prompt-cache-all
-co --color [on|off|auto]
-lv --verbosity --log-verbosity N $LOG_VERBOSITY
--log-colors [on|off|auto] $LOG_COLORS
--log-prefix $LOG_PREFIX
--no-log-prefix $NO_LOG_PREFIX
--log-timestamps $LOG_TIMESTAMPS
--no-log-timestamps $NO_LOG_TIMESTAMPS
--no-log-jsonl $NO_LOG_JSONL

| the context is never shifted
--no-context-shift $NO_CONTEXT_SHIFT
--keep N

| chat templates are always Jinja
--jinja $JINJA
--no-jinja $NO_JINJA

| there are only models of text
--no-mmproj --no-mmproj-auto $NO_MMPROJ_AUTO

| one KV cache holds every prompt until its room is needed
-ctxcp --ctx-checkpoints --swa-checkpoints N $CTX_CHECKPOINTS
-cms --checkpoint-min-step N $CHECKPOINT_MIN_SPACING_NT
-cram --cache-ram N $CACHE_RAM
--cache-idle-slots $CACHE_IDLE_SLOTS
--no-cache-idle-slots $NO_CACHE_IDLE_SLOTS
--cache-reuse N $CACHE_REUSE
-sps --slot-prompt-similarity SIMILARITY

--threads-http N $THREADS_HTTP
"""

ACCEPTED = {
    "generate": """
-no-cnv --no-conversation | generate holds no conversation
--show-timings $SHOW_TIMINGS | timings are shown unless there is --no-perf
""",
    "chat": r"""
| chat is a conversation
-cnv --conversation
-i --interactive
-if --interactive-first

-mli --multiline-input | a line that ends with \ goes on with the next one
--no-show-timings $NO_SHOW_TIMINGS | timings are shown with -v only
--reasoning-format {auto|deepseek} $THINK | thoughts are told apart from answers
""",
    "serve": """
--metrics $ENDPOINT_METRICS | /metrics is always there
--slots $ENDPOINT_SLOTS | /slots is always there
--cache-prompt $CACHE_PROMPT | prompts are always looked for in the cache, unless a request says cache_prompt false
--embedding --embeddings $EMBEDDINGS | /v1/embeddings is always there, beside everything else
--ui --webui $UI | the chat page is always there
--prefill-assistant $PREFILL_ASSISTANT | a last message of the assistant is always continued
--no-skip-chat-parsing $NO_SKIP_CHAT_PARSING | tool calls and thoughts are always told apart from answers
--reasoning-format {auto|deepseek} $THINK | thoughts are reasoning_content, unless a request says reasoning_format none
--cors-origins {*} $CORS_ORIGINS | pages of any origin may call the server

| there are no tools but those of clients
-no-ag --no-agent $NO_AGENT
--no-ui-mcp-proxy --no-webui-mcp-proxy $NO_UI_MCP_PROXY
""",
    # llama-bench gives switches a value, or several.
    "bench": """
-nkvo --no-kv-offload [0|1]
--no-host [0|1]
--repack [0|1]
-mmp --mmap [0|1]
-dio --direct-io [0|1]
-nopo --no-op-offload [0|1]
-embd --embeddings {0} | logits are always computed

| the context is as large as a test needs
-c --ctx-size N
-fitc --fit-ctx N
""",
}

UNSUPPORTED = r"""
-cl --cache-list
--completion-bash
--server-base URL
--verbose-prompt
-lcs --lookup-cache-static FNAME
-lcd --lookup-cache-dynamic FNAME
--context-shift $CONTEXT_SHIFT | give a larger -c
-bf --binary-file FNAME | a text comes from a file with -f
-ptc --print-token-count N

| use mpillama chat
-cnv --conversation
-i --interactive
-if --interactive-first
-mli --multiline-input

| the chat template puts texts around a message; another one is named with --chat-template or --chat-template-file
--in-prefix-bos
--in-prefix STRING
--in-suffix STRING

--show-timings $SHOW_TIMINGS | mpillama generate shows timings, and mpillama chat does with -v
--no-show-timings $NO_SHOW_TIMINGS | use --no-perf

| use --rope-scaling yarn with --rope-scale
-gan --grp-attn-n N $GRP_ATTN_N
-gaw --grp-attn-w N $GRP_ATTN_W

| let ranks share the model, with -dev cuda:0,cpu and -ts, or with --ep
-ot --override-tensor PATTERN=TYPE,... $OVERRIDE_TENSOR
-cmoe --cpu-moe $CPU_MOE
-ncmoe --n-cpu-moe N $N_CPU_MOE
-ncffn --n-cpu-ffn N $N_CPU_FFN

-rpc --rpc SERVERS $RPC | start mpillama with mpirun: ranks take the place of RPC servers

| merge it into the model first
--lora FNAME
--lora-scaled FNAME:SCALE,...
--lora-init-without-apply

--control-vector FNAME
--control-vector-scaled FNAME:SCALE,...
--control-vector-layer-range START END
-mu --model-url URL $MODEL_URL | use -hf, or download the file and name it with -m
-dr --docker-repo MODEL $DOCKER_REPO | use -hf, or name a file with -m

| there are only models of text
-mm --mmproj FILE $MMPROJ
-mmu --mmproj-url URL $MMPROJ_URL
--mmproj-auto $MMPROJ_AUTO
--mmproj-offload $MMPROJ_OFFLOAD
--no-mmproj-offload $NO_MMPROJ_OFFLOAD
-mmdev --mmproj-device DEVICE
--image --audio --video FILE
--image-min-tokens N $IMAGE_MIN_TOKENS
--image-max-tokens N $IMAGE_MAX_TOKENS
--video-fps N $VIDEO_FPS
--video-timestamp-interval N $VIDEO_TIMESTAMP_INTERVAL
--video-ffmpeg-dir DIR $VIDEO_FFMPEG_DIR
--mtmd-batch-max-tokens N $MTMD_BATCH_MAX_TOKENS
--media-path PATH

--reasoning-budget-message MESSAGE $THINK_BUDGET_MESSAGE
--reasoning-preserve $REASONING_PRESERVE
--no-reasoning-preserve $NO_REASONING_PRESERVE
--skip-chat-parsing $SKIP_CHAT_PARSING | requests of mpillama serve may have reasoning_format none
-o --output --output-file FNAME | send stdout to a file: > FNAME
--log-jsonl $LOG_JSONL
--log-prompts-dir PATH
--kv-unified-per-slot N $KV_UNIFIED_PER_SLOT
--spm-infill
--pooling TYPE $POOLING | embeddings are pooled as the model file says
--tags STRING $TAGS
--reuse-port $REUSE_PORT
--path PATH $STATIC_PATH
--api-prefix PREFIX $API_PREFIX | let a proxy add it

| use a tunnel or a proxy
--ssl-key-file FNAME $SSL_KEY_FILE
--ssl-cert-file FNAME $SSL_CERT_FILE

--no-cache-prompt $NO_CACHE_PROMPT | requests may have cache_prompt false
--props $ENDPOINT_PROPS
--no-slots $NO_ENDPOINT_SLOTS | with --api-key, only who has the key sees slots
--rerank --reranking $RERANKING
--no-prefill-assistant $NO_PREFILL_ASSISTANT

| leave it out: a draft only changes speed
--spec-draft-model -md --model-draft FNAME $SPEC_DRAFT_MODEL
--spec-draft-hf -hfd -hfrd --hf-repo-draft MODEL $SPEC_DRAFT_HF_REPO
--spec-draft-threads -td --threads-draft N
--spec-draft-threads-batch -tbd --threads-batch-draft N
--spec-draft-type-k -ctkd --cache-type-k-draft TYPE $SPEC_DRAFT_CACHE_TYPE_K
--spec-draft-type-v -ctvd --cache-type-v-draft TYPE $SPEC_DRAFT_CACHE_TYPE_V
--spec-draft-override-tensor -otd --override-tensor-draft PATTERN=TYPE,...
--spec-draft-cpu-moe -cmoed --cpu-moe-draft $SPEC_DRAFT_CPU_MOE
--spec-draft-n-cpu-moe --spec-draft-ncmoe -ncmoed --n-cpu-moe-draft N $SPEC_DRAFT_N_CPU_MOE
--spec-draft-n-max N $SPEC_DRAFT_N_MAX
--spec-draft-n-min N $SPEC_DRAFT_N_MIN
--spec-draft-p-split --draft-p-split P $SPEC_DRAFT_P_SPLIT
--spec-draft-p-min --draft-p-min P $SPEC_DRAFT_P_MIN
--spec-draft-device -devd --device-draft dev1,dev2,...
--spec-draft-ngl -ngld --gpu-layers-draft --n-gpu-layers-draft N $N_GPU_LAYERS_DRAFT
--spec-type TYPE $SPEC_TYPE
--spec-default
--draft --draft-n --draft-max N $DRAFT_MAX
--draft-min --draft-n-min N $DRAFT_MIN
--spec-draft-cpu-mask -Cd --cpu-mask-draft M
--spec-draft-cpu-range -Crd --cpu-range-draft lo-hi
--spec-draft-cpu-strict --cpu-strict-draft 0|1
--spec-draft-prio --prio-draft N
--spec-draft-poll --poll-draft 0|1
--spec-draft-cpu-mask-batch -Cbd --cpu-mask-batch-draft M
--spec-draft-cpu-strict-batch --cpu-strict-batch-draft 0|1
--spec-draft-prio-batch --prio-batch-draft N
--spec-draft-poll-batch --poll-batch-draft 0|1
--spec-synth-len L $SPEC_SYNTH_LEN
--spec-synth-rates P0,P1,... $SPEC_SYNTH_RATES
--spec-draft-backend-sampling $SPEC_DRAFT_BACKEND_SAMPLING
--no-spec-draft-backend-sampling $NO_SPEC_DRAFT_BACKEND_SAMPLING
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

--embd-normalize N

| pages of any origin may call the server; a proxy can be stricter
--cors-methods METHODS $CORS_METHODS
--cors-headers HEADERS $CORS_HEADERS
--cors-credentials $CORS_CREDENTIALS
--no-cors-credentials $NO_CORS_CREDENTIALS

--no-ui --no-webui $NO_UI
--ui-config --webui-config JSON $UI_CONFIG
--ui-config-file --webui-config-file PATH $UI_CONFIG_FILE
--ui-mcp-proxy --webui-mcp-proxy $UI_MCP_PROXY
--tools TOOL1,TOOL2,... $TOOLS
--tools-runtime OPTION $TOOLS_RUNTIME
--mcp-servers-config PATH $MCP_SERVERS_CONFIG
--mcp-servers-json JSON $MCP_SERVERS_JSON
-ag --agent $AGENT
--sse-ping-interval N $SSE_PING_INTERVAL
--sleep-idle-seconds SECONDS

| a server has one model: start one for each
--models-dir PATH $MODELS_DIR
--models-preset PATH $MODELS_PRESET
--models-max N $MODELS_MAX
--models-autoload $MODELS_AUTOLOAD
--no-models-autoload $NO_MODELS_AUTOLOAD

| name the model with -hf
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

-npp N0,N1,... | mpillama bench measures prompts with -p N, of -npl sequences at once
-ntg N0,N1,... | mpillama bench measures generation after prompts with -n N -d DEPTH, of -npl sequences at once
-pps | in mpillama bench -npl sequences have a prompt each
-tgs | mpillama bench measures one sequence at a time with -npl 1
"""

PROGRAMS = {
    "server": "use mpillama serve",
    "cli": "use mpillama chat",
    "main": "use mpillama generate",
    "completion": "use mpillama generate",
    "simple": "use mpillama generate",
    "run": "use mpillama generate, or mpillama chat",
    "bench": "use mpillama bench",
    "batched-bench": "use mpillama bench with -npl",
    "embedding": "use mpillama serve, which has /v1/embeddings",
    **dict.fromkeys(("perplexity", "quantize", "tokenize", "imatrix", "gguf-split", "export-lora"), "use llama.cpp's"),
}
"""llama.cpp's programs, without ``llama-`` in front, and what takes their place here."""
