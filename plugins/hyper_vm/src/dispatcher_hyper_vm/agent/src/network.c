/* Links, addresses and routes, by netlink. */
#include "agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_addr.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

struct message {
  struct nlmsghdr header;
  union {
    struct ifinfomsg link;
    struct ifaddrmsg address;
    struct rtmsg route;
  } body;
  char attributes[512];
};

static void begin(struct message *message, uint16_t type, uint16_t flags, size_t body)
{
  memset(message, 0, sizeof *message);
  message->header.nlmsg_type = type;
  message->header.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK | flags;
  message->header.nlmsg_len = NLMSG_LENGTH((uint32_t)body);
}

static struct rtattr *attribute(struct message *message, uint16_t type, const void *data, size_t size)
{
  struct rtattr *at = (struct rtattr *)((char *)message + NLMSG_ALIGN(message->header.nlmsg_len));
  at->rta_type = type;
  at->rta_len = (uint16_t)RTA_LENGTH(size);
  memcpy(RTA_DATA(at), data, size);
  message->header.nlmsg_len = NLMSG_ALIGN(message->header.nlmsg_len) + RTA_ALIGN(at->rta_len);
  return at;
}

/* Send, and wait for the kernel's word. Returns 0 or an errno. */
static int talk(int netlink, struct message *message)
{
  char answer[4096];
  if (send(netlink, message, message->header.nlmsg_len, 0) < 0)
    return errno;
  ssize_t size = recv(netlink, answer, sizeof answer, 0);
  if (size < (ssize_t)NLMSG_LENGTH(sizeof(struct nlmsgerr)))
    return size < 0 ? errno : EIO;
  const struct nlmsghdr *header = (const struct nlmsghdr *)answer;
  if (header->nlmsg_type != NLMSG_ERROR)
    return EIO;
  return -((const struct nlmsgerr *)NLMSG_DATA(header))->error;
}

static int set_link(int netlink, int index, const char *name, const uint8_t *mac, uint32_t mtu, int up)
{
  struct message message;
  begin(&message, RTM_NEWLINK, 0, sizeof message.body.link);
  message.body.link.ifi_index = index;
  if (up >= 0) {
    message.body.link.ifi_change = IFF_UP;
    message.body.link.ifi_flags = up ? IFF_UP : 0;
  }
  if (name)
    attribute(&message, IFLA_IFNAME, name, strlen(name) + 1);
  if (mac)
    attribute(&message, IFLA_ADDRESS, mac, 6);
  if (mtu)
    attribute(&message, IFLA_MTU, &mtu, sizeof mtu);
  return talk(netlink, &message);
}

struct address {
  int family;
  uint8_t bytes[16], size, prefix;
};

static int parse_address(const char *text, struct address *address, struct err *err)
{
  char plain[64];
  const char *slash = strchr(text, '/');
  size_t size = slash ? (size_t)(slash - text) : strlen(text);
  if (size >= sizeof plain)
    return err_set(err, ERR_INVALID, "%.60s is no address", text);
  memcpy(plain, text, size);
  plain[size] = 0;
  address->family = strchr(plain, ':') ? AF_INET6 : AF_INET;
  address->size = address->family == AF_INET6 ? 16 : 4;
  long prefix = slash ? strtol(slash + 1, NULL, 10) : address->size * 8;
  if (inet_pton(address->family, plain, address->bytes) != 1 || prefix < 0 || prefix > address->size * 8)
    return err_set(err, ERR_INVALID, "%.60s is no address", text);
  address->prefix = (uint8_t)prefix;
  return 0;
}

static int add_address(int netlink, int index, const char *text, struct err *err)
{
  struct address address;
  struct message message;
  if (parse_address(text, &address, err) < 0)
    return -1;
  begin(&message, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, sizeof message.body.address);
  message.body.address = (struct ifaddrmsg){ .ifa_family = (uint8_t)address.family, .ifa_prefixlen = address.prefix,
                                             .ifa_index = (uint32_t)index };
  if (address.family == AF_INET6)
    message.body.address.ifa_flags = IFA_F_NODAD; /* the host has made sure; nobody waits a second */
  attribute(&message, IFA_LOCAL, address.bytes, address.size);
  attribute(&message, IFA_ADDRESS, address.bytes, address.size);
  if (address.family == AF_INET && address.prefix < 31) {
    uint32_t broadcast;
    memcpy(&broadcast, address.bytes, 4);
    broadcast |= htonl(address.prefix ? 0xffffffffu >> address.prefix : 0xffffffffu);
    attribute(&message, IFA_BROADCAST, &broadcast, 4);
  }
  int number = talk(netlink, &message);
  if (number && number != EEXIST)
    return err_errno(err, number, "cannot add the address %s", text);
  return 0;
}

static int add_route(int netlink, const struct json *route, struct err *err)
{
  struct address to, via, source;
  struct message message;
  const char *to_text = json_string(route, "to", ""), *via_text = json_string(route, "via", "");
  const char *source_text = json_string(route, "source", "");
  int index = (int)if_nametoindex(json_string(route, "device", ""));
  uint32_t metric = (uint32_t)json_number(route, "metric", 0), mtu = (uint32_t)json_number(route, "mtu", 0);
  if (!index)
    return err_set(err, ERR_NOT_FOUND, "the route to %.60s names no interface of the pod", to_text);
  if (parse_address(to_text, &to, err) < 0 || (*via_text && parse_address(via_text, &via, err) < 0) ||
      (*source_text && parse_address(source_text, &source, err) < 0))
    return -1;
  if ((*via_text && via.family != to.family) || (*source_text && source.family != to.family))
    return err_set(err, ERR_INVALID, "the route to %.60s mixes families", to_text);
  begin(&message, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, sizeof message.body.route);
  message.body.route = (struct rtmsg){
    .rtm_family = (uint8_t)to.family, .rtm_dst_len = to.prefix, .rtm_table = RT_TABLE_MAIN, .rtm_protocol = RTPROT_STATIC,
    .rtm_scope = *via_text || to.family == AF_INET6 ? RT_SCOPE_UNIVERSE : RT_SCOPE_LINK, .rtm_type = RTN_UNICAST,
    .rtm_flags = *via_text ? RTNH_F_ONLINK : 0, /* some networks have a gateway outside of every prefix */
  };
  if (to.prefix)
    attribute(&message, RTA_DST, to.bytes, to.size);
  if (*via_text)
    attribute(&message, RTA_GATEWAY, via.bytes, via.size);
  if (*source_text)
    attribute(&message, RTA_PREFSRC, source.bytes, source.size);
  attribute(&message, RTA_OIF, &index, sizeof index);
  if (metric)
    attribute(&message, RTA_PRIORITY, &metric, sizeof metric);
  if (mtu) {
    struct rtattr *metrics = attribute(&message, RTA_METRICS, "", 0);
    struct rtattr *inner = attribute(&message, RTAX_MTU, &mtu, sizeof mtu);
    metrics->rta_len = (uint16_t)((char *)inner + RTA_ALIGN(inner->rta_len) - (char *)metrics);
  }
  int number = talk(netlink, &message);
  if (number && number != EEXIST)
    return err_errno(err, number, "cannot add the route to %s", to_text);
  return 0;
}

/* The devices that are not loopback, in the order of their numbers. Interfaces that the pod has made are behind. */
static int device_index(int64_t position)
{
  struct if_nameindex *list = if_nameindex();
  int found = 0;
  for (int pass = 0; list && pass <= position; pass++) {
    int next = 0;
    for (struct if_nameindex *item = list; item->if_index; item++) {
      int index = (int)item->if_index;
      if (strcmp(item->if_name, "lo") != 0 && index > found && (!next || index < next))
        next = index;
    }
    found = next;
    if (!found)
      break;
  }
  if (list)
    if_freenameindex(list);
  return found;
}

static int parse_mac(const char *text, uint8_t mac[6])
{
  unsigned parts[6];
  char end;
  if (sscanf(text, "%2x:%2x:%2x:%2x:%2x:%2x%c", parts, parts + 1, parts + 2, parts + 3, parts + 4, parts + 5, &end) != 6)
    return -1;
  for (int i = 0; i < 6; i++)
    mac[i] = (uint8_t)parts[i];
  return 0;
}

static int set_interface(int netlink, const struct json *item, struct err *err)
{
  uint8_t mac[6];
  const char *name = json_string(item, "name", ""), *mac_text = json_string(item, "mac", "");
  int64_t device = json_number(item, "device", 0), mtu = json_number(item, "mtu", 0);
  if (!*name || strlen(name) >= IFNAMSIZ || strchr(name, '/'))
    return err_set(err, ERR_INVALID, "%.20s is no name of an interface", name);
  if (*mac_text && parse_mac(mac_text, mac) < 0)
    return err_set(err, ERR_INVALID, "%.20s is no hardware address", mac_text);
  int index = device_index(device);
  if (!index)
    return err_set(err, ERR_NOT_FOUND, "the guest has no network device %d", (int)device);
  char current[IFNAMSIZ] = "";
  if_indextoname((unsigned)index, current);
  int number = 0;
  /* A name and a hardware address change only while the link is down. */
  if (strcmp(current, name) != 0 || *mac_text) {
    number = set_link(netlink, index, NULL, NULL, 0, 0);
    if (!number)
      number = set_link(netlink, index, strcmp(current, name) ? name : NULL, *mac_text ? mac : NULL, 0, -1);
  }
  if (!number)
    number = set_link(netlink, index, NULL, NULL, (uint32_t)mtu, 1);
  if (number)
    return err_errno(err, number, "cannot set up the interface %s", name);
  for (const struct json *address = json_list(item, "addresses"); address; address = address->next)
    if (address->type != JSON_STRING || add_address(netlink, index, address->string, err) < 0)
      return -1;
  return 0;
}

int network_setup(struct agent *agent, const struct json *setup, struct err *err)
{
  (void)agent;
  cleanup_fd int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
  if (netlink < 0)
    return err_errno(err, errno, "cannot talk to the kernel's network");
  int number = set_link(netlink, (int)if_nametoindex("lo"), NULL, NULL, 0, 1);
  if (number)
    return err_errno(err, number, "cannot bring up the loopback interface");
  for (const struct json *item = json_list(setup, "interfaces"); item; item = item->next)
    if (set_interface(netlink, item, err) < 0)
      return -1;
  /* Routes on the link first: gateways may lie behind them. */
  for (int with_via = 0; with_via < 2; with_via++)
    for (const struct json *route = json_list(setup, "routes"); route; route = route->next)
      if ((*json_string(route, "via", "") != 0) == with_via && add_route(netlink, route, err) < 0)
        return -1;
  return 0;
}
