/* Frames between the agent and the host.
 *
 * Theory of operation. One byte stream (a virtio-serial port; in tests a UNIX socket) carries frames both ways. The same
 * text stands in protocol.py, and both sides are tested against the same golden frames.
 *
 *   header    32 bytes, little endian: magic u32, length u32, type u8, flags u8, source u16, id u32, seq u64, time u64
 *   payload   `length` bytes, at most 64 KiB
 *   trailer   4 bytes, none of them zero
 *
 * Messages. A REQUEST (host), REPLY or EVENT (guest) is a message: a length u32, JSON of that length, and a blob of
 * bytes behind it, cut into frames; all but the last have the flag MORE. Frames of a message follow each other, with
 * only stream frames between them. Their `seq` counts frames of messages in that direction, from 1. A REPLY has the id
 * of its REQUEST; an EVENT has the id 0.
 *
 * Streams. The host chooses a stream's id and names it in a request. DATA carries bytes; its `seq` is the position
 * behind them, `source` tells standard output from error, `time` when they were read from the process. A stream's
 * positions begin where the request says (0, or inside a container's output). CREDIT tells the sender the position up
 * to which it may send: absolute, so that telling it twice changes nothing. The guest begins with WINDOW bytes, the host
 * with what the first CREDIT says. END closes one direction; the guest's has the final position in `seq`, and in its
 * payload the exit code u32, where the stream is that of a process. RESET tells that a stream is gone, and why. Frames
 * for a stream that has been let go are dropped.
 *
 * Reconnection. A connection is a session: requests in flight and streams end with it, and executed commands are
 * killed. What must outlive it is state, kept until the host lets it go: containers with their exits until "delete",
 * output by position until "trim". The new host reads the states, opens output at the position up to which it has
 * written, and gets the same chunks with the same times. Where output is not trimmed, its process has to wait.
 *
 * Resynchronisation. Either side may have been cut off in the middle of a frame, and bytes of the old session may still
 * be on their way. The host begins with zeros, more than a frame can hold. They complete a cut frame, whose trailer is
 * then wrong, so it is dropped; further zeros are skipped; no payload is ever searched for a beginning. SYNC follows,
 * with 16 random bytes and a range of versions u16, u16. The guest forgets the old session and answers HELLO: the same
 * bytes, the version it chose or 0, its own range, and a message about itself. The host drops all before that.
 */
#ifndef FRAME_H
#define FRAME_H

#include "base.h"

#define VERSION_MIN 1
#define VERSION_MAX 1

#define FRAME_MAGIC 0xC1A90DF7u
#define FRAME_HEADER 32
#define FRAME_TRAILER 4
#define FRAME_PAYLOAD (64 * 1024)
#define FRAME_WHOLE (FRAME_HEADER + FRAME_PAYLOAD + FRAME_TRAILER)
#define MESSAGE_REQUEST (4 * 1024 * 1024)
#define WINDOW (256 * 1024)
#define NONCE 16

enum frame_type { SYNC = 1, HELLO, REQUEST, REPLY, EVENT, DATA, CREDIT, END, RESET };
enum frame_flag { FLAG_MORE = 1 };
enum frame_source { SOURCE_NONE, SOURCE_STDOUT, SOURCE_STDERR };

struct frame {
  uint8_t type, flags;
  uint16_t source;
  uint32_t id;
  uint64_t seq, time_ns;
  const char *payload;
  uint32_t size;
};

/* Append a frame's bytes. */
void frame_encode(struct buffer *out, const struct frame *frame);

/* Cuts bytes into frames. What is no frame is skipped, as told under "Resynchronisation". */
struct frame_parser {
  char *buffer; /* FRAME_WHOLE bytes */
  size_t start, end;
  uint64_t skipped; /* bytes, since the last time that somebody set it to 0 */
};

void frame_parser_init(struct frame_parser *parser);
void frame_parser_free(struct frame_parser *parser);

/* Where the next bytes go, and how many have room; there is always room. Then say how many came. */
char *frame_room(struct frame_parser *parser, size_t *room);
void frame_filled(struct frame_parser *parser, size_t size);

/* True, and the next frame, which is valid until the next call of any of these; or false when bytes are missing. */
bool frame_next(struct frame_parser *parser, struct frame *frame);

uint32_t get_u32(const char *from);
uint64_t get_u64(const char *from);
void put_u16(char *to, uint16_t value);
void put_u32(char *to, uint32_t value);
void put_u64(char *to, uint64_t value);

#endif
